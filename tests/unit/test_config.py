"""Recipes: precedence, frozen settings, unknown keys, cross-field checks, and that the shipped ones load."""

import json

import pytest
from pydantic import ValidationError

from tdro_ray.config import Recipe, Settings, least_workers, most_workers, run_folder, store_folder
from tdro_ray.errors import ConfigError
from tdro_ray.recipe import RECIPES, load_recipe, recipe_names


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 7\noptimize: {eta: 0.5, steps: 20}\nreference: {steps: 30}\n")
    return path


def test_defaults_are_overridden_by_the_recipe_and_that_by_set(recipe_file):
    assert Recipe().optimize.eta == 0.02
    found = load_recipe(str(recipe_file))
    assert (found.seed, found.optimize.eta, found.optimize.steps, found.reference.steps) == (7, 0.5, 20, 30)
    assert found.optimize.clip == Recipe().optimize.clip and found.finetune == Recipe().finetune
    found = load_recipe(str(recipe_file), ("optimize.eta=0.125", "seed=8", "optimize.eta=0.25", "model.lora.r=4"))
    assert (found.seed, found.optimize.eta, found.optimize.steps) == (8, 0.25, 20)
    assert found.model.lora is not None and found.model.lora.r == 4 and found.model.lora.alpha == 32


def test_a_set_changes_one_stage_even_where_the_file_shares_settings():
    for recipe in recipe_names():
        before, after = load_recipe(recipe), load_recipe(recipe, ("finetune.steps=7",))
        assert after.finetune.steps == 7 and (after.reference, after.optimize) == (before.reference, before.optimize)


def test_the_name_is_the_files_unless_it_says_so(recipe_file, tmp_path):
    assert load_recipe(str(recipe_file)).name == "mine"
    assert load_recipe(str(recipe_file), ("name=other",)).name == "other"
    with pytest.raises(ConfigError, match="name"):
        load_recipe(str(recipe_file), ("name=../escape",))


def test_set_reads_values_as_yaml(recipe_file):
    found = load_recipe(
        str(recipe_file),
        (
            "weights=[ema, top70]",
            "model.instructions=false",
            "data.sources=folder",
            "index.tasks=[a]",
            "optimize.learning_rate=1.0e-3",
        ),
    )
    assert found.weights == ("ema", "top70") and found.model.instructions is False
    assert found.data.sources == ("folder",) and found.index.tasks == ("a",) and found.optimize.learning_rate == 1e-3


def models(kind=Settings):
    for model in kind.__subclasses__():
        yield model
        yield from models(model)


@pytest.mark.parametrize("model", sorted(models(), key=lambda m: m.__name__), ids=lambda m: m.__name__)
def test_every_setting_is_frozen_and_closed(model):
    with pytest.raises(ValidationError, match="extra_forbidden"):
        model.model_validate({"no_such_field": 1})
    made = model.model_construct()
    with pytest.raises(ValidationError, match="frozen"):
        setattr(made, next(iter(model.model_fields)), None)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimze.eta=1", r"'optimze'\. Did you mean 'optimize'"),
        ("optimize.eat=1", r"'optimize.eat'\. Did you mean 'eta'"),
        ("reference.learning_rat=1", "Did you mean 'learning_rate'"),
        ("data.environment.max_row=1", "Did you mean 'max_rows'"),
        ("model.lora.rank=4", "unknown key"),
        ("reference.zzz=1", "Valid: .*batch_size"),
        ("optimize.eta=-1", r"optimize\.eta: .*greater than 0 \(got -1\)"),
        ("optimize.eta=fast", r"optimize\.eta: .*number"),
        ("optimize.measure=ratoi", r"optimize\.measure: .*'ratio'.*got 'ratoi'"),
        ("optimize.num_negatives=0", "stage 1 has no in-batch negatives"),
        ("mine.last_rank=1", "last_rank must not be below"),
        ("scale.num_workers=-1", r"scale\.num_workers: "),
        ("scale.num_workers=[3, 2]", r"scale\.num_workers: .*\[fewest, most\]"),
        ("scale.num_workers=[0, 2]", r"scale\.num_workers: .*\[fewest, most\]"),
        ("scale.num_workers=many", r"scale\.num_workers: .*\[fewest, most\]"),
        ("optimize.distill=1", r"optimize\.distill has no effect"),
        ("scale.storage=runs", r"scale\.storage must be a URL"),
        ("scale={num_workers: 0, storage: 's3://bucket/runs'}", r"scale\.storage has no effect"),
        ("serve.port=70000", r"serve\.port: "),
        ("seed", "takes key=value.*got 'seed'"),
        ("=3", "takes key=value"),
        ("seed.x=1", "'seed' holds 7, which has no fields"),
        ("optimize.eta=[1", "not a valid YAML value"),
    ],
)
def test_a_wrong_set_says_what_is_valid(recipe_file, override, said):
    with pytest.raises(ConfigError, match=said):
        load_recipe(str(recipe_file), (override,))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("- a\n- b\n", "must hold a mapping, it holds list"),
        ("", "must hold a mapping, it holds NoneType"),
        ("a: [1", "not valid YAML"),
        ("optimise: {}", "Did you mean 'optimize'"),
    ],
)
def test_a_wrong_file_says_so(tmp_path, text, said):
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said):
        load_recipe(str(path))


def test_a_recipe_that_is_not_there_names_the_nearest():
    with pytest.raises(ConfigError, match=r"No recipe 'quikstart'. Did you mean 'quickstart'"):
        load_recipe("quikstart")
    with pytest.raises(ConfigError, match=r"cannot be read: No such file.*quickstart"):
        load_recipe("there/is/no.yaml")


def test_the_resolved_recipe_survives_json(recipe_file):
    found = load_recipe(str(recipe_file), ("data.store=here", "scale.num_workers=[2, 4]"))
    assert (least_workers(found.scale), most_workers(found.scale)) == (2, 4)
    assert least_workers(Recipe().scale) == most_workers(Recipe().scale) == 2
    assert Recipe.model_validate(json.loads(json.dumps(found.model_dump(mode="json")))) == found


@pytest.mark.parametrize("name", recipe_names())
def test_shipped_recipes_load_under_their_own_name(name):
    assert load_recipe(name).name == name


@pytest.mark.parametrize("name", ["lora-8b", "laptop"])
def test_every_setting_of_a_recipe_to_start_from_is_explained(name):
    lines = (RECIPES / f"{name}.yaml").read_text().splitlines()
    settings = [line for line in lines if line.strip() and not line.startswith("#")]
    plain = {"name:", "data:", "mine:", "model:", "lora:", "scale:", "reference:", "optimize:", "serve:", "-"}
    unsaid = [ln for ln in settings if "  # " not in ln and ln.split()[0] not in plain]
    assert not unsaid and max(map(len, lines)) <= 120


def test_what_the_recipes_promise():
    large, small = load_recipe("lora-8b"), load_recipe("laptop")
    assert large.model.lora is not None and large.model.lora.r == 16 and large.scale.num_workers == 8
    assert large.model.gradient_checkpointing and large.model.dtype == "bfloat16" and large.scale.use_gpu
    assert {s.batch_size for s in (large.reference, large.optimize, large.finetune)} == {2048}
    assert small.model.lora is None and not small.scale.use_gpu and small.model.passage_length <= 128


def test_where_runs_live(monkeypatch, tmp_path, recipe_file):
    monkeypatch.delenv("TDRO_RUNS", raising=False)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe(str(recipe_file))
    assert (
        run_folder(recipe) == tmp_path / "runs" / "mine"
        and store_folder(recipe) == tmp_path / "runs" / "mine" / "store"
    )
    monkeypatch.setenv("TDRO_RUNS", str(tmp_path / "elsewhere"))
    assert run_folder(recipe) == tmp_path / "elsewhere" / "mine"
    assert store_folder(load_recipe(str(recipe_file), ("data.store=s",))) == tmp_path / "s"
