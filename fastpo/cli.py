"""The command line: `fastpo train | eval | plot | compare | plan | settings | doctor`.

A command imports what it needs when it runs: `--help`, `--version` and `settings` need no torch.

Exit codes: 0 done, 1 a run failed, 2 bad input, 128 + n stopped by signal n (130 = Ctrl-C).
"""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastpo import __version__

if TYPE_CHECKING:
    from fastpo.trainer.config import Config

OUT_OF_MEMORY = ("out of memory", "can't allocate memory")  # torch on a GPU, on a CPU
OVERRIDE = "a setting in place of the recipe's: `fastpo settings` lists them"
TRAIN_EXTRA = "the trainer needs more packages: pip install 'fastpo[train]'"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; every expected failure is one line on stderr."""
    code = _run(arguments)
    if "TORCHELASTIC_RUN_ID" in os.environ:  # started by torchrun
        # Not by way of finalization: threads of a process group that has lost a rank wait in it.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def _run(arguments: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):  # prompts and completions may hold any character
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    options = _parse(arguments)
    try:
        repeat = [argument for argument in arguments if argument != "--resume"]
        return options.run(options, shlex.join([_program(), *repeat]))
    except KeyboardInterrupt as stop:
        print("fastpo: stopped at once; the last checkpoint, if any, is intact", file=sys.stderr)
        return getattr(stop, "exit_code", 130)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("fastpo"):
            raise
        print(f"fastpo: {error}; {TRAIN_EXTRA}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, `| head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the flush at exit, too
        return 1
    except OSError as error:  # a full disk, a directory that cannot be written, ...
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        hint = "; the last checkpoint, if any, is intact, and --resume goes on from it"
        print(f"fastpo: {error}{hint if full else ''}", file=sys.stderr)
        return 1
    except Exception as error:
        code, message = getattr(error, "exit_code", 1), str(error)
        if any(sign in message for sign in OUT_OF_MEMORY):
            message = f"{message.splitlines()[0]}; lower optim.token_budget or rollout.batch_size"
        elif not hasattr(error, "exit_code"):
            raise
        print(f"fastpo: {message}", file=sys.stderr)
        return code


def _program() -> str:
    """How this program was called, so that the line that repeats a run works as printed."""
    called = Path(sys.argv[0])
    found = shutil.which("fastpo")
    if called.name != "fastpo" or (found and Path(found).samefile(called)):
        return "fastpo"
    return os.path.relpath(called)


def _parse(arguments: list[str]) -> argparse.Namespace:
    # argparse takes no positionals after an option: key=value may stand anywhere.
    parser = _parser(arguments)
    if not arguments:
        parser.print_help(sys.stderr)
        sys.exit(2)
    options, rest = parser.parse_known_args(arguments)
    if rest and (any(a.startswith("-") for a in rest) or not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {shlex.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _parser(arguments: list[str]) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="fastpo", description="Policy optimization for LLMs.")
    parser.add_argument("--version", action="version", version=f"fastpo {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    train = commands.add_parser(
        "train",
        allow_abbrev=False,  # the line that repeats a run leaves --resume out
        help="train a policy by a recipe",
        description="Train a policy by a TOML recipe. Any setting can be given as key=value; "
        "`fastpo settings` lists them.",
    )
    train.add_argument("recipe", nargs="?", help="TOML file; without one, key=value alone")
    train.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDE)
    train.add_argument("--resume", action="store_true", help="go on from the run's checkpoint")
    train.add_argument("--seeds", help="one run for each, one after another: 0,1,2", metavar="N,N")
    train.add_argument("--dry-run", action="store_true", help="check the recipe, load no weights")
    _add_ranks(train)
    train.set_defaults(run=_train)
    evaluate = commands.add_parser(
        "eval",
        help="accuracy, pass@k and maj@k on held-out problems",
        description="Evaluate a checkpoint on held-out problems, with 95 % intervals. pass@k and "
        "maj@k need several completions: eval.samples=8 eval.temperature=1.0.",
    )
    evaluate.add_argument(
        "path", type=Path, help="directory of a run, of a checkpoint or of a model; or a recipe"
    )
    evaluate.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDE)
    evaluate.add_argument("--json", action="store_true", help="print one JSON object")
    evaluate.set_defaults(run=_eval)
    plot = commands.add_parser("plot", help="draw a run's curves.png, or several runs in one")
    plot.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="directory of a run")
    plot.add_argument("--out", type=Path, help="file of several runs' curves (compare.png)")
    plot.set_defaults(run=_plot)
    compare = commands.add_parser("compare", help="a table of runs: before, after, what differs")
    compare.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="directory of a run")
    compare.set_defaults(run=_compare)
    planned = commands.add_parser(
        "plan",
        usage="fastpo plan RECIPE [key=value ...] [--ranks N]\n       "
        "fastpo plan --vocab V --hidden D --tokens N [--dtype T] [--budget B] [--device D]",
        help="memory of a recipe's run, or of a loss step for each way to compute it",
        description="Of a recipe, `fastpo plan RECIPE key=value --ranks N`: bytes per rank of a "
        "run of it. Without one, of a loss step of the shape given:",
    )
    if arguments[:1] == ["plan"] and _names_recipe(arguments[1:]):
        planned.add_argument("recipe", help="TOML file")
        planned.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDE)
        _add_ranks(planned)
    elif arguments[:1] == ["plan"]:
        from fastpo import plan

        plan.add_arguments(planned)
    planned.set_defaults(run=_plan)
    settings = commands.add_parser("settings", help="list every setting of a recipe")
    settings.set_defaults(run=_settings)
    doctor = commands.add_parser(
        "doctor", help="which backends this machine has, and why not others"
    )
    doctor.set_defaults(run=_doctor)
    return parser


def _names_recipe(arguments: list[str]) -> bool:
    """Whether these, of `plan`, are about a recipe: it may stand behind options."""
    first = (arguments or ["-"])[0]
    return (
        not first.startswith("-")
        or any(a.startswith("--rank") for a in arguments)
        or any(a.endswith(".toml") for a in arguments)
    )


def _add_ranks(parser: argparse.ArgumentParser) -> None:
    most = range(1, 2**20)
    help_ = "of the run that is planned (with train: by --dry-run)"
    parser.add_argument("--ranks", type=int, choices=most, default=1, metavar="N", help=help_)


def _train(options: argparse.Namespace, command: str) -> int:
    from fastpo.trainer.run import recipe

    path, overrides = options.recipe, options.overrides
    if path is None:
        raise recipe.RecipeError(
            "no recipe was given: name a TOML file, `fastpo train recipes/demo.toml`, or settings "
            "alone, `fastpo train task=sort warmup.max_steps=40` (`fastpo settings` lists them)"
        )
    if "=" in path and not Path(path).exists():  # settings alone
        path, overrides = None, [path, *overrides]
    config = recipe.load(path, overrides)
    if options.dry_run:
        return _show_footprint("dry_run", config, options.ranks)
    from fastpo.trainer.run import seeds  # torch: after the recipe's own mistakes

    if options.seeds is not None:
        seeds.train_each(config, options.seeds, resume=options.resume, command=command)
    else:
        seeds.train(config, resume=options.resume, command=command)
    return 0


def _eval(options: argparse.Namespace, command: str) -> int:
    from fastpo.trainer.evaluation import evaluate_saved
    from fastpo.trainer.run import scores

    result = evaluate_saved(options.path, options.overrides)
    print(scores.as_json(result) if options.json else scores.as_text(result))
    return 0


def _plot(options: argparse.Namespace, command: str) -> int:
    from fastpo.trainer.run.plot import overlay, plot

    one = len(options.runs) == 1 and options.out is None
    print(plot(options.runs[0]) if one else overlay(options.runs, options.out))
    return 0


def _compare(options: argparse.Namespace, command: str) -> int:
    from fastpo.trainer.run.compare import compare

    compare(options.runs)
    return 0


def _show_footprint(check: str, config: Config, ranks: int) -> int:
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # where there is no network: one line
    from fastpo.trainer.model import footprint
    from fastpo.trainer.run import dryrun

    print(footprint.table(getattr(dryrun, check)(config, ranks), config))
    if check == "dry_run":
        print(f"The dry run passed: {ranks} rank{'s' * (ranks > 1)}, and nothing was written.")
    return 0


def _plan(options: argparse.Namespace, command: str) -> int:
    if hasattr(options, "recipe"):
        from fastpo.trainer.run import recipe

        config = recipe.load(options.recipe, options.overrides)
        return _show_footprint("plan", config, options.ranks)
    from fastpo import plan

    try:
        return plan.run(options)
    except ValueError as error:
        print(f"fastpo: {error}", file=sys.stderr)
        return 2


def _settings(options: argparse.Namespace, command: str) -> int:
    from fastpo.trainer.run.recipe import settings

    for setting in settings():
        print(f"{setting.key} = {setting.default}  ({setting.type})\n    {setting.help}")
    return 0


def _doctor(options: argparse.Namespace, command: str) -> int:
    from fastpo.doctor import report

    print(report())
    return 0


if __name__ == "__main__":
    sys.exit(main())
