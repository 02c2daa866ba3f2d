"""``ella demo``: eight real text tasks, one after another, three ways, in a few minutes on two cores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ella.config import EllaConfig

from .compare import check_arms, compare_arms
from .models import LoraSettings, build_classifier, packaged_minilm
from .questions import question_tasks
from .stream import StreamConfig, StreamResult
from .tasks import Task, TaskError, load_benchmark

__all__ = ["BENCHMARK_ORDER", "DEMO_CONFIG", "QUESTION_ORDER", "run_demo"]

DEMO_CONFIG = StreamConfig(learning_rate=4e-3, lr_scheduler_type="linear", epochs=1, batch_size=8)
DEMO_LORA = LoraSettings(r=8, alpha=16, target_modules=("query", "value"))
MAX_LENGTH = 48
QUESTION_ORDER = ("library", "exception", "type", "section")
BENCHMARK_ORDER = ("dbpedia", "amazon", "agnews", "mnli")
#: Per task, (train, test): small enough without --data for five minutes in all.
QUESTION_SIZE, BENCHMARK_SIZE = (280, 40), (1000, 300)
#: A question is two tasks, each of half of its classes: all questions are asked once, then again about the other half.
#: Its texts are this many times a task's, train and test, so that each half has enough and each seed draws its own.
PARTS, TEXTS = 2, (3, 6)


def run_demo(
    *,
    data: str | Path | None = None,
    order: Sequence[str] = BENCHMARK_ORDER,
    seeds: Sequence[int] = (0,),
    train_examples: int | None = None,
    test_examples: int | None = None,
    ella_lambda: float | str = "auto",
    arms: Sequence[str] = ("seqlora", "inclora", "ella"),
    out_dir: str | Path = "demo_out",
    resume: bool = False,
    progress: bool = True,
) -> list[StreamResult]:
    """Run the demo and write its report into ``out_dir``.

    Args:
        data: a benchmark folder in the O-LoRA layout; None asks four questions about the installed code, each in
            two halves of its classes.
        order: task names, with ``data`` only.
        seeds: one full comparison per seed; the seed draws the examples, their order and the adapters.
        train_examples, test_examples: per task; None takes the default of the data source.
        ella_lambda: strength of the ELLA arm, see :class:`~ella.EllaConfig`.
        arms: see :data:`ella.continual.arms.ARMS`; "alone" adds the second forward transfer.
        out_dir: report and states; earlier states of these arms and seeds there are deleted unless ``resume``.
        resume: continue an interrupted demo with the same settings.
        progress: show tqdm bars.

    Raises ImportError without the packaged model, TaskError for data that cannot be used, ValueError for bad settings.
    """
    check_arms(arms, seeds)
    packaged_minilm()  # a missing model is said before any work
    size = BENCHMARK_SIZE if data else QUESTION_SIZE
    n_train, n_test = train_examples or size[0], test_examples or size[1]
    if data:
        found = load_benchmark(data, order)
        tasks = [task for task in found if isinstance(task, Task)]
        if len(tasks) < len(found):
            written = [task.name for task in found if not isinstance(task, Task)]
            raise TaskError(f"the demo's model writes no texts, which tasks {written} ask for; expected classes")
        title = ", ".join(task.name for task in tasks)
        source = f"{data}: {', '.join(order)}"
    else:
        questions = question_tasks(QUESTION_ORDER, train_per_task=TEXTS[0] * n_train, test_per_task=TEXTS[1] * n_test)
        parts = zip(*(question.split_classes(PARTS) for question in questions), strict=True)
        tasks = [task for part in parts for task in part]
        title = "four questions about installed code, in two halves"
        source = f"installed code, four questions, each in two halves: {', '.join(QUESTION_ORDER)}"

    def tasks_of_seed(seed: int) -> list[Task]:
        return [task.subset(n_train, n_test, seed) for task in tasks]

    sizes = "; ".join(
        f"{t.name} {len(t.train)}/{len(t.test)}, {len(t.labels)} classes" for t in tasks_of_seed(seeds[0])
    )
    return compare_arms(
        lambda: build_classifier(lora=DEMO_LORA, max_length=MAX_LENGTH),
        tasks_of_seed,
        replace(DEMO_CONFIG, ella=EllaConfig(ella_lambda=ella_lambda)),
        arms=arms,
        seeds=seeds,
        out_dir=out_dir,
        title=f"Continual learning with ELLA: {title}",
        notes={
            "data": source,
            "examples (train/test)": sizes,
            "model": "all-MiniLM-L6-v2, LoRA r = 8 on query and value, labels scored by cosine",
            "λ": f"{ella_lambda}",
        },
        resume=resume,
        progress=progress,
    )
