"""The command line: `tdro` and `python -m tdro_ray`. Parses, then hands over; imports neither torch nor Ray itself.

Exit codes: 0 done, 2 a mistake that the message says how to mend, 130 interrupted (run again to go on).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

STAGES = {
    "ingest": "read the sources into the collection store",
    "clean": "drop training rows that repeat test queries, and audit every task",
    "mine": "give every row hard negatives",
    "reference": "train the reference model with uniform weights (stage 0, and the baseline)",
    "score": "compute the reference similarities that stage 1 draws",
    "optimize": "train the proxy with DRO and learn the task weights (stage 1)",
    "finetune": "fine-tune with the learned weights and the baselines to compare (stage 2)",
    "evaluate": "measure every trained model on every held-out test",
    "index": "build the search index with the best model",
    "report": "write report.html from what has run",
}
UNTIL = ("ingest", "clean", "mine", "reference", "score", "optimize", "finetune", "evaluate", "seeds", "index")


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = argparse.ArgumentParser(
        prog="tdro",
        description="Learned data mixtures (tDRO) for dense retrieval, on Ray.",
        epilog="Recipes: `tdro recipes`. Any setting: --set a.b=c. Runs live in ./runs or $TDRO_RUNS.",
    )
    commands = top.add_subparsers(dest="command", metavar="COMMAND", required=True)
    run = _with_recipe(commands.add_parser("run", help="run all stages of a recipe; what is up to date is skipped"))
    run.add_argument(
        "--no-serve", action="store_true", help="leave out the last step, the HTTP service and its sample queries"
    )
    run.add_argument(
        "--dry-run",
        action="store_true",
        help="only show stages, rows, tokens, memory, disk and time; nothing is started or written",
    )
    run.add_argument("--until", choices=[*UNTIL], metavar="STAGE", help=f"end after this stage: {', '.join(UNTIL)}")
    compare = _with_recipe(
        commands.add_parser(
            "compare", help="train and measure the mixtures to compare with, and report: no index, no service"
        )
    )
    compare.add_argument(
        "--rivals", default="", metavar="A,B,…", help="mixtures (default: the recipe's `compare`, or all built-in)"
    )
    compare.add_argument(
        "--seeds", type=int, default=0, metavar="N", help="runs of everything (default: the recipe's `seeds`)"
    )
    for name, text in STAGES.items():
        _with_recipe(commands.add_parser(name, help=text))
    _with_recipe(commands.add_parser("tune", help="search DRO learning rate, temperature and measure with Ray Tune"))
    _with_recipe(commands.add_parser("influence", help="leave one task out at a time: what each does to the others"))
    serve = _with_recipe(commands.add_parser("serve", help="serve the indexed retriever over HTTP until interrupted"))
    serve.add_argument("--model", help="a model folder instead of the run's best")
    serve.add_argument("--index", help="an index folder instead of the run's")
    export = _with_recipe(
        commands.add_parser("export", help="write a trained model for Hugging Face, peft or onnxruntime")
    )
    export.add_argument("--model", default="", help="name of the trained model (default: the best)")
    export.add_argument("--to", required=True, metavar="FOLDER", help="folder to write")
    export.add_argument(
        "--format",
        choices=("hf", "lora", "onnx"),
        default="hf",
        help="merged Hugging Face and sentence-transformers folder, LoRA adapter alone, or ONNX for a CPU (default: hf)",
    )
    submit = commands.add_parser("submit", help="run a tdro command as a Ray job and follow its log")
    submit.add_argument(
        "--address",
        default="",
        help="dashboard address of the cluster (default: $RAY_API_SERVER_ADDRESS or http://127.0.0.1:8265)",
    )
    submit.add_argument("--detach", action="store_true", help="do not follow the log")
    submit.add_argument("arguments", nargs=argparse.REMAINDER, metavar="COMMAND …", help="e.g. run quickstart")
    commands.add_parser("recipes", help="list the shipped recipes")
    _index_commands(commands)
    return top


def _index_commands(commands: Any) -> None:
    kept = commands.add_parser("versions", help="list an index folder's versions; go back to one, snapshot, restore")
    kept.add_argument("folder", metavar="INDEX_FOLDER")
    one = kept.add_mutually_exclusive_group()
    one.add_argument(
        "--select", metavar="VERSION", default="", help="make this version current; changes since then stay in view"
    )
    one.add_argument("--snapshot", metavar="NAME", default="", help="keep the documents in force now under a name")
    one.add_argument(
        "--restore",
        metavar="NAME",
        default="",
        help="make a snapshot current as a new version; what was written after it is no longer searched",
    )
    merge = commands.add_parser("merge", help="merge the documents written over HTTP into a new version of the index")
    merge.add_argument("folder", metavar="INDEX_FOLDER")


def _with_recipe(command: argparse.ArgumentParser) -> argparse.ArgumentParser:
    command.add_argument("recipe", metavar="RECIPE", help="name of a shipped recipe, or a .yaml file")
    command.add_argument(
        "--set", action="append", default=[], metavar="a.b=c", dest="overrides", help="override a setting (repeatable)"
    )
    return command


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    arguments = parser().parse_args(argv)
    from tdro_ray.errors import TdroError

    try:
        from tdro_ray import commands

        return commands.run(arguments)
    except TdroError as err:
        print(f"tdro: {err}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("tdro: interrupted; what is finished is kept, the same command goes on from there", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
