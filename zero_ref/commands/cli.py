"""The command line: `zero-ref compare`, `bench`, `train`, `grade`, `show`, `export`, `import`."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from ..ranks.launch import RankError, init, launch
from ..tasks import data, files
from ..tasks.named import NAMED
from ..tasks.task import OPTIMIZERS, Task
from .train import backend_for

PER_RANK, STEPS = 64, 25  # samples for each rank, and steps, by default


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command. Returns the exit status: 2 for what cannot be run, 130 after Ctrl-C."""
    args = _parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        print("zero-ref: interrupted; all ranks were stopped", file=sys.stderr)
        return 130
    except RankError as error:
        # These are about what was asked for, and say so in one sentence; anything else is a fault,
        # and its traceback is what helps.
        asked_for = error.kind in ("ValueError", "Damaged", "NoCheckpoint", "OSError")
        print(f"zero-ref: {error.reason if asked_for else error}", file=sys.stderr)
        return 2
    except (ValueError, OSError) as error:
        print(f"zero-ref: {error}", file=sys.stderr)
        return 2


def _parser():
    parser = argparse.ArgumentParser(
        prog="zero-ref", description="ZeRO stages 0-3, compared and measured on real data.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    compare = commands.add_parser(
        "compare", help="all stages and torch DDP side by side: weights, bytes, time",
        description="Train torch DDP, FSDP2 and stages 0-3 on the same data and check what ZeRO "
                    "promises. Exit status 1 if a promise does not hold or a stage fails, 2 if "
                    "nothing could be run; systems of your own do not change it. Under "
                    "torchrun it compares on the ranks that were started.")
    compare.set_defaults(run=_compare)
    compare.add_argument("--stages", type=int, nargs="+", default=[0, 1, 2, 3],
                         choices=[0, 1, 2, 3], help="default: 0 1 2 3; stage 0 is always run")
    compare.add_argument("--system", nargs="+", action="extend", default=[],
                         metavar="FILE.py:FUNCTION",
                         help="more to compare with: a function wrap_like(module, stage)")
    compare.add_argument("--template", action="store_true",
                         help="print a file to start from, for --model, and do nothing else")
    compare.add_argument("--figure", type=Path, metavar="FILE", help="draw the result (.png, .svg)")

    train = commands.add_parser(
        "train", help="one training run of one stage, also under torchrun",
        description="Train one stage. Under torchrun it joins the ranks that were started, e.g. "
                    "torchrun --nproc-per-node 4 -m zero_ref train --stage 3; alone it starts "
                    "--world-size ranks itself.")
    train.set_defaults(run=_train)
    train.add_argument("--stage", type=int, required=True, choices=[0, 1, 2, 3])
    train.add_argument("--checkpoint-dir", type=Path, metavar="DIR",
                       help="save checkpoints there, and go on from the newest: under torchrun's "
                            "--max-restarts a run survives what happens to its ranks, and on "
                            "SIGTERM they save once more, and end")
    train.add_argument("--checkpoint-every", type=int, default=10, metavar="K",
                       help="steps between two checkpoints; default: 10")

    bench = commands.add_parser(
        "bench", help="step time, bytes and memory beside torch DDP, FSDP2 and others",
        description="Time every stage beside what people use instead, in turns.")
    bench.set_defaults(run=_bench)
    bench.add_argument("--model", nargs="+", default=["3M"], metavar="MODEL",
                       help="CNN, 3M, 15M, 57M, or a file or module as with compare; default: 3M "
                            "(compute decides; at 57M messages do)")
    bench.add_argument("--systems", nargs="+", metavar="NAME", help="default: all that are there")
    bench.add_argument("--world-size", type=int, nargs="+", default=[2], metavar="N",
                       help="numbers of ranks, one after another; default: 2")
    bench.add_argument("--rounds", type=int, default=5, metavar="R", help="default: 5")
    bench.add_argument("--steps", type=int, default=10, metavar="K",
                       help="per round; default: 10. Of the CNN, whose step is short, ten times K")
    bench.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    bench.add_argument("--backend", choices=["gloo", "nccl"])
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    bench.add_argument("--figure", type=Path, metavar="FILE", help="draw the result (.png, .svg)")

    grade = commands.add_parser(
        "grade", help="points for what learners have written in the course's notebooks",
        description="Run learners' notebooks and judge their answers, each apart from the others. "
                    "Exit status 1 if something could not be graded, such as a file that is no "
                    "notebook.")
    grade.set_defaults(run=_grade)
    grade.add_argument("paths", type=Path, nargs="+", metavar="PATH",
                       help="a notebook, a my_zero.py, or a folder with a file or a folder for "
                            "each learner")
    grade.add_argument("--csv", type=Path, metavar="FILE",
                       help="write a line for each learner and exercise")
    grade.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON")
    grade.add_argument("--timeout", type=float, default=240, metavar="S",
                       help="seconds for a notebook, of which a cell gets a quarter; default: 240")

    show = commands.add_parser(
        "show", help="what is in a checkpoint",
        description="Check a checkpoint's files, and list its tensors and what else is in it.")
    show.set_defaults(run=_show)
    export = commands.add_parser(
        "export", help="a checkpoint's model as one safetensors file",
        description="Write the model of a checkpoint into one safetensors file, which others read, "
                    "such as Hugging Face's from_pretrained. Needs neither ranks nor a GPU.")
    export.set_defaults(run=_export)
    for command in (show, export):
        command.add_argument("checkpoint", type=Path, metavar="CHECKPOINT",
                             help="a checkpoint, or a folder of them, of which the newest counts")
    export.add_argument("out", type=Path, metavar="OUT.safetensors")

    import_ = commands.add_parser(
        "import", help="a checkpoint from others' safetensors files",
        description="Commit a checkpoint of a model's state dict, which zero_ref.load then gives "
                    "to any stage and any number of ranks.")
    import_.set_defaults(run=_import)
    import_.add_argument("files", type=Path, nargs="+", metavar="FILE.safetensors")
    import_.add_argument("folder", type=Path, metavar="FOLDER",
                         help="where the checkpoint is committed")

    for command in (compare, train):
        what = command.add_mutually_exclusive_group()
        what.add_argument("--task", default="digits", choices=data.TASKS)
        what.add_argument("--model", metavar="MODEL",
                          help="your own: a file my_model.py or a module my_package.my_module with "
                               "functions build, batch and loss, or a Hugging Face config.json; or "
                               f"one of {', '.join(NAMED)}, which bench uses")
        command.add_argument("--data-dir", type=Path, help="where the MNIST files are (task mnist)")
        command.add_argument("--world-size", type=int, metavar="N",
                             help="number of ranks to start (default: 4)")
        command.add_argument("--steps", type=int, metavar="K",
                             help=f"default: {STEPS}, of a model of your own 20")
        command.add_argument("--batch-size", type=int, metavar="B",
                             help=f"of a task: samples per step, all ranks together (default: "
                                  f"{PER_RANK} for each rank)")
        command.add_argument("--optimizer", choices=OPTIMIZERS,
                             help="default: Adam, or what a model of your own brings")
        command.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
        command.add_argument("--backend", choices=["gloo", "nccl"],
                             help="default: nccl on cuda, gloo on cpu")
        command.add_argument("--seed", type=int, default=0)
        command.add_argument("--json", type=Path, metavar="FILE", help="write the figures as JSON")
    return parser


def _compare(args):
    if args.template:
        print(files.TEMPLATE, end="")
        return 0
    from .compare import run

    _check_output(args.json, figure=args.figure)
    ours = _world_size(args)
    short = [name.rpartition(":")[2] for name in args.system]
    systems = {last if short.count(last) == 1 else name: _loaded_there(name)
               for name, last in zip(args.system, short)}
    report = run(_make_task(args, ours), args.stages, ours, steps=_steps(args), systems=systems,
                 device=args.device, backend=args.backend, seed=args.seed)
    if _is_first():
        print(report)
        _write_json(args.json, report)
        if args.figure:
            report.figure().savefig(args.figure)
            print(f"Drawn: {args.figure}")
    failed = [row for row in report["systems"] if row["kind"] == "ours" and row["failed"]]
    return 1 if failed or report["failed_promises"] else 0


def _loaded_there(name):
    """The user's function, which every rank loads for itself."""
    files.load_function(name)  # complains here if it cannot be
    return lambda module, stage: files.load_function(name)(module, stage)


def _train(args):
    from .train import train

    _check_output(args.json)
    world_size = _world_size(args)
    make_task = _make_task(args, world_size)

    def on_rank():
        return train(make_task, args.stage, steps=_steps(args), device=args.device, seed=args.seed,
                     checkpoint_dir=args.checkpoint_dir, checkpoint_every=args.checkpoint_every)

    if _under_torchrun():
        report = on_rank()
    else:
        report = launch(on_rank, world_size,
                        backend=backend_for(args.device, world_size, args.backend))[0]
    if _is_first():
        held = ", ".join(f"{kind} {size / 1e3:,.1f} kB"
                         for kind, size in report["resident_bytes"].items())
        what = f"held-out {report['metric']}" if report["metric"] else "loss"
        print(f"{report['task']}, stage {report['stage']}, {world_size} ranks on "
              f"{report['device']}, {_steps_done(report)}: {what} {report['held_out']:.4f}, "
              f"{report['samples_per_second']:,.0f} samples/s; rank 0 holds {held}")
        _write_json(args.json, report)
    return 0


def _steps_done(report):
    resumed = f" from step {report['first_step']} on" if report["first_step"] else ""
    return f"{report['steps']} steps{resumed}" + " (stopped by SIGTERM)" * report["stopped"]


def _under_torchrun():
    return {"RANK", "LOCAL_RANK", "WORLD_SIZE"} <= os.environ.keys()


def _is_first():
    return int(os.environ.get("RANK", 0)) == 0 or not _under_torchrun()


def _world_size(args):
    """The number of ranks. Under torchrun it joins them."""
    if not _under_torchrun():
        return 4 if args.world_size is None else args.world_size
    world_size = int(os.environ["WORLD_SIZE"])
    if args.world_size not in (None, world_size):
        raise ValueError(f"--world-size {args.world_size}, but torchrun started {world_size} "
                         "ranks; leave it out, or change --nproc-per-node")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    init(backend_for(args.device, here, args.backend))
    return world_size


def _steps(args):
    return args.steps if args.steps is not None else 20 if args.model else STEPS


def _make_task(args, world_size) -> Callable[[], Task]:
    """A function that makes what is trained, on every rank."""
    if args.model and (args.batch_size is not None or args.data_dir is not None):
        raise ValueError("--batch-size and --data-dir are for --task: with --model your batch() "
                         "decides what a rank sees")
    optimizer, model, seed = args.optimizer, args.model, args.seed
    if model:
        def make_task():
            task = files.load(model, world_size)
            return replace(task, optimizer=OPTIMIZERS[optimizer]) if optimizer else task
    else:
        name, data_dir = args.task, args.data_dir
        batch_size = PER_RANK * world_size if args.batch_size is None else args.batch_size

        def make_task():
            return data.task(name, data_dir, world_size, batch_size, optimizer, seed)
    return make_task


def _bench(args):
    from .bench import bench, print_report

    _check_output(args.json, figure=args.figure)
    report = bench(args.model, args.systems, args.world_size, rounds=args.rounds, steps=args.steps,
                   device=args.device, backend=args.backend)
    print_report(report)
    _write_json(args.json, report)
    if args.figure:
        from ..viz.bench import draw

        draw(report).savefig(args.figure)
        print(f"Drawn: {args.figure}")
    return 0


def _grade(args):
    from ..labs.grade import left_out
    from .grade import print_report, run, write_csv

    _check_output(args.json, args.csv)
    rows = run(args.paths, args.timeout)
    print_report(rows, left_out(args.paths))
    _write_json(args.json, rows)
    if args.csv:
        write_csv(args.csv, rows)
    return 0 if all(row["graded"] for row in rows) else 1


def _show(args):
    from .checkpoint import show

    show(args.checkpoint)
    return 0


def _export(args):
    from ..checkpoint.converting import export

    _check_output(args.out)
    count = export(args.checkpoint, args.out)
    print(f"Written: {args.out}, {count} tensors")
    return 0


def _import(args):
    from ..checkpoint.converting import import_

    print(f"Committed: {import_(args.files, args.folder)}")
    return 0


def _check_output(*files, figure=None):
    """Complain about a file that cannot be written before the run, not after it."""
    for path in filter(None, (*files, figure)):
        if path.is_dir():
            raise ValueError(f"cannot write {path}: it is a folder; name a file in it")
        if not path.resolve().parent.is_dir():
            raise ValueError(f"cannot write {path}: the folder {path.parent} does not exist")
    if figure and figure.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"cannot draw {figure}: the name must end with .png, .svg or .pdf")


def _write_json(path, report):
    if path:
        path.write_text(json.dumps(report, indent=1) + "\n")
