def write_report(recipe, trials, best, study, path): path.write_text("x")
