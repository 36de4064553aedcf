"""`distil`: from a teacher and a student's sizes to the student of the best step, its figures and its curve."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastbert.distil.config import DistilConfig, has_sizes
from fastbert.distil.loop import DistilRun, DistilTrainer
from fastbert.distil.models import Models, usable
from fastbert.distil.plan import Plan
from fastbert.distil.sentences import Sentences
from fastbert.distil.student import Distillation, build_student, check_vocabulary, copied
from fastbert.distil.teacher import Teacher, check_int8
from fastbert.distil.work import Labelled, Text, Work
from fastbert.finetune.data import Sources
from fastbert.finetune.plot import plot_curves
from fastbert.train import store
from fastbert.train.progress import duration
from fastbert.train.session import Session
from fastbert.train.settings import scheduled


@dataclass(frozen=True)
class Result:
    """The files of a finished distillation, and how good its student is."""

    out: Path
    # the student's folder in Hugging Face's layout, of the best step
    model: Path
    steps: int
    seconds: float
    # what the best step was chosen by, and that step
    metric: str
    best_step: int
    # values of the best student and of the teacher on the validation data, and on the test data where there is some
    student: dict[str, float]
    teacher: dict[str, float]
    student_test: dict[str, float] | None
    teacher_test: dict[str, float] | None
    # parameters of the student and of the teacher
    parameters: tuple[int, int]
    # whether this process is the one that reports
    main: bool = True


def distil(
    config: DistilConfig | None,
    out: str | Path,
    *,
    train: Any = None,
    validation: Any = None,
    test: Any = None,
    resume: bool = False,
    quiet: bool = False,
    say: Callable[[str], None] | None = None,
) -> Result:
    """Train a student on a teacher's outputs and write that of the best evaluation to OUT/model.

    What is trained follows from the teacher: masked words of plain text, the task that it was fine-tuned for, or
    vectors of sentences. With `resume` the run in OUT goes on, and `config` may be None. `train` is a data set of
    `datasets`, a list of dicts, or for sentences a list of texts, instead of the settings' files; `validation` and
    `test` are for labelled data. A resumption is given the same again.

    Raises ValueError, TypeError or OSError before training for settings, data or folders that can't be used,
    loop.Stopped after SIGTERM or SIGINT, and TrainingError when training can't go on.
    """
    given = Sources(train, validation, test)
    models = None
    if config is not None and not resume:
        config, models = usable(config, Path(out), train is not None, validation is not None)
        check_vocabulary(config, models)
    session = Session(DistilConfig, config, out, resume=resume, quiet=quiet, say=say)
    with session as s:
        if s.config.int8:
            check_int8(s.device)
        models = models or Models.of(s.config)
        work = make_work(s, models, given)
        teacher = work.load_teacher().to(s.device)

        def build() -> Distillation:
            student = build_student(s.config, teacher, work.kind, models.student_folder)
            plan = Plan.of(s.config, teacher.config, student.config)
            return Distillation(student, plan, work, teacher.config)

        model = s.model(build)
        observed = Teacher(teacher, work, model.losses.plan.wanted(1), s.config.int8)
        # last of what may be refused: text is written to OUT
        work.open()
        s.say(_description(s.config, model, teacher, work))
        s.begin(model, lambda: scheduled(s.config, work.epoch, s.config.shards or 1))
        run = DistilRun(DistilTrainer(model, observed, work, s.config, s.world), work, s)
        run.train()
        return _report(s, run, work, teacher)


def make_work(s: Session[DistilConfig], models: Models, given: Sources) -> Work:
    """The work of the kind of data that the settings name."""
    if s.config.data == "text":
        if given.train is not None:
            raise ValueError("train is given and the data is text: name its files as sources")
        return Text(s, models)
    if s.config.data == "sentences":
        if given.validation is not None or given.test is not None:
            raise ValueError("validation or test is given and the data is sentences: name files")
        return Sentences(s, models, given.train)
    return Labelled(s, models, given)


def summary(result: Result) -> list[str]:
    """How good the student is beside its teacher, and where it is, in a few lines."""
    lines = [f"{result.steps} steps in {duration(result.seconds)}, best at {result.best_step}"]
    pairs = [("validation", result.student, result.teacher)]
    if result.student_test is not None and result.teacher_test is not None:
        pairs.append(("test", result.student_test, result.teacher_test))
    for name, own, theirs in pairs:
        shown = [n for n in own if n in theirs and not n.startswith(("f1_", "accuracy_"))]
        found = "  ".join(f"{n} {own[n]:.4f} (teacher {theirs[n]:.4f})" for n in shown[:4])
        lines.append(f"{name:<12} {found}")
    own_size, size = (n / 1e6 for n in result.parameters)
    lines.append(f"{'parameters':<12} {own_size:.2f} M (teacher {size:.2f} M)")
    names = {"model": result.model, "metrics": result.out / "metrics.jsonl"}
    return lines + [f"{name:<12} {path}" for name, path in names.items()]


def _report(s: Session[DistilConfig], run: DistilRun, work: Work, teacher: Any) -> Result:
    """Judge the saved student, loaded as users load it, and the teacher; write the figures and the curve."""
    at, best = run.trainer.at, run.best["step"]
    s.world.meet()
    saved, head = work.load_student(s.model_folder)
    saved = saved.to(s.device)
    own, theirs = work.judge(saved, head), work.judge(teacher)
    own_test, their_test = work.judge_test(saved, head), work.judge_test(teacher)
    sizes = tuple(sum(p.numel() for p in m.parameters()) for m in (saved, teacher))
    if s.world.main:
        title = f"distillation, {s.config.losses}"
        plot_curves(s.out / "metrics.jsonl", s.out / "curves.png", run.metric, best, title)
        values = {
            "steps": at.step,
            "seconds": at.seconds,
            "metric": run.metric,
            "best_step": best,
            "student": own,
            "teacher": theirs,
            "student_test": own_test,
            "teacher_test": their_test,
            "parameters": dict(zip(("student", "teacher"), sizes, strict=True)),
        }
        store.write_json(s.out / "result.json", values)
    return Result(
        s.out,
        s.model_folder,
        at.step,
        at.seconds,
        run.metric,
        best,
        own,
        theirs,
        own_test,
        their_test,
        sizes,
        s.world.main,
    )


def _description(config: DistilConfig, model: Distillation, teacher: Any, work: Work) -> str:
    own, size = (sum(p.numel() for p in m.parameters()) / 1e6 for m in (model.student, teacher))
    c = model.student.config
    sizes = (
        f"student of {own:.2f} M parameters, {c.num_hidden_layers} layers x {c.hidden_size}, teacher {size:.2f} M, "  # type: ignore[union-attr]
        f"{teacher.config.num_hidden_layers} x {teacher.config.hidden_size}"
    )
    origin = _origin(config, model.student, teacher)
    return f"{sizes}; {origin}; {work.describe()}; losses {config.losses}"


def _origin(config: DistilConfig, student: Any, teacher: Any) -> str:
    """What a student starts from, in a few words."""
    assert config.student is not None
    if not has_sizes(config.student):
        return f"it starts from {config.student}"
    if config.start == "fresh":
        return "it starts from random weights"
    keys = copied(config, student, teacher)
    own = dict(student.named_parameters())
    count = sum(p.numel() for name, p in own.items() if name in keys) / 1e6
    layers = sorted(
        {int(rest.split(".")[0]) for key in keys.values() if (rest := key.partition("layers.")[2])}
    )
    return (
        f"{count:.2f} M of its parameters are copied from the teacher, "
        f"{'layers ' + ', '.join(map(str, layers)) if layers else 'no layer'} among them"
    )
