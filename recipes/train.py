"""Train one adapter on one task after another with ELLA: ``python recipes/train.py RECIPE.yaml [--tiny] [--out DIR]``.

Under ``accelerate launch`` the engine is the launcher's (recipes/accelerate), under ``torchrun`` DDP or ``--engine``'s.
The same command again goes on where a run was stopped: finished tasks are read from the output folder, the running one
from its last checkpoint. ``--tiny`` takes the recipe's small random model and a few made-up texts instead, on the CPU.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Trainer,
    TrainingArguments,
    set_seed,
)
from transformers.trainer_utils import get_last_checkpoint

from ella import EllaConfig, EllaRegularizer, attach
from ella.continual.tasks import ORDERS, load_benchmark

FINISHED = "finished.json"
_TINY_TRAINING = {
    "max_steps": 4, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1, "save_steps": 2,
    "logging_steps": 1, "use_cpu": True, "report_to": [],
}  # fmt: skip


ENGINES = ("fsdp2", "zero2", "zero3")


class Example(NamedTuple):
    prompt: str
    completion: str


@dataclass(frozen=True)
class Recipe:
    """A recipe file; unknown keys are errors.

    Attributes:
        model: a folder or a name on the hub. dtype: of its weights. quantization: None or "nf4".
        lora, ella, training: fields of LoraConfig, EllaConfig and TrainingArguments.
        tasks: ``benchmark`` and ``order`` (see ella.continual.tasks), or ``files``: name to a file of json lines with
            "prompt" and "completion", in order.
        max_length: tokens of a prompt with its completion; longer prompts lose their front.
        tiny: fields of the small model's configuration.
    """

    model: str
    lora: dict[str, Any]
    ella: dict[str, Any]
    training: dict[str, Any]
    tasks: dict[str, Any]
    tiny: dict[str, Any]
    dtype: str = "bfloat16"
    quantization: str | None = None
    max_length: int = 512
    out: str = "recipe_out"
    seed: int = 0
    template: str = "{sentence}\nOptions: {options}\nAnswer:"
    folder: Path = field(default=Path())

    @classmethod
    def read(cls, path: Path) -> Recipe:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
        known = {f.name for f in fields(cls)} - {"folder"}
        if not isinstance(data, dict) or set(data) - known:
            unknown = sorted(set(data) - known) if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"{path}: unknown keys {unknown}; a recipe has {sorted(known)}")
        return cls(**data, folder=path.parent)


# --- tasks ------------------------------------------------------------------------------------------------------------


def read_tasks(recipe: Recipe) -> dict[str, list[Example]]:
    """Training examples by the task's name, in order."""
    settings = recipe.tasks
    if "files" in settings:
        return {name: _lines(recipe.folder / file) for name, file in settings["files"].items()}
    order = settings["order"]
    found = load_benchmark(recipe.folder / settings["benchmark"], ORDERS.get(order, ()) or order)
    return {
        task.name: [
            Example(recipe.template.format(sentence=r["sentence"], options=", ".join(task.labels)), " " + r["label"])
            for r in task.train
        ]
        for task in found
    }


def _lines(path: Path) -> list[Example]:
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [Example(record["prompt"], record["completion"]) for record in records]


_WORDS = {"fruit": "apple pear plum cherry", "metal": "iron copper zinc tin", "bird": "owl heron crow finch"}


def tiny_tasks() -> dict[str, list[Example]]:
    """Two tasks of sixteen made-up texts."""
    draw = random.Random(0)
    return {
        name: [
            Example(f"I saw one {draw.choice(_WORDS[kind].split())} today. What is it?", f" {kind}")
            for kind in draw.choices(kinds, k=16)
        ]
        for name, kinds in (("first", ("fruit", "metal")), ("second", ("metal", "bird")))
    }


def encoded(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example], max_length: int, is_seq2seq: bool
) -> list[dict[str, list[int]]]:
    """What the model is trained on: the loss is on the completion."""
    made = []
    for prompt, completion in examples:
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        target = tokenizer(completion, add_special_tokens=False)["input_ids"] + end
        given = tokenizer(prompt, add_special_tokens=not is_seq2seq)["input_ids"] + (end if is_seq2seq else [])
        if is_seq2seq:
            made.append({"input_ids": given[-max_length:], "labels": target})
            continue
        given = given[-max(1, max_length - len(target)) :]
        made.append({"input_ids": given + target, "labels": [-100] * len(given) + target})
    return [one | {"attention_mask": [1] * len(one["input_ids"])} for one in made]


# --- the model --------------------------------------------------------------------------------------------------------


def load(recipe: Recipe, path: str) -> tuple[PreTrainedTokenizerBase, PeftModel]:
    """Tokenizer and base model from ``path``, with a fresh adapter."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    dtype = getattr(torch, recipe.dtype)
    options: dict[str, Any] = {"dtype": dtype}
    if recipe.quantization is not None:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=recipe.quantization, bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )  # fmt: skip
    is_seq2seq = AutoConfig.from_pretrained(path).is_encoder_decoder
    model = (AutoModelForSeq2SeqLM if is_seq2seq else AutoModelForCausalLM).from_pretrained(path, **options)
    model.config.use_cache = False
    set_seed(recipe.seed)
    return tokenizer, get_peft_model(model, LoraConfig(**recipe.lora))


def save_tiny(recipe: Recipe, folder: Path) -> None:
    """The recipe's small model with random weights, and a tokenizer of the made-up texts' words."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = sorted({word for task in tiny_tasks().values() for one in task for word in _split(f"{one[0]} {one[1]}")})
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *words])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings = dict(recipe.tiny)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings, vocab_size=len(vocabulary), pad_token_id=0,
                                  bos_token_id=1, eos_token_id=2)  # fmt: skip
    if config.is_encoder_decoder:
        config.decoder_start_token_id = 0
    torch.manual_seed(0)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    auto.from_config(config, dtype=getattr(torch, recipe.dtype)).save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=raw, **special).save_pretrained(folder)


def _split(text: str) -> list[str]:
    from tokenizers import pre_tokenizers

    return [word for word, _ in pre_tokenizers.Whitespace().pre_tokenize_str(text)]


# --- the run ----------------------------------------------------------------------------------------------------------


def engine_settings(engine: str | None, model: PeftModel) -> dict[str, Any]:
    """The ``TrainingArguments`` of an engine; None leaves it to the launcher."""
    if engine == "fsdp2":
        blocks = sorted(model.get_base_model()._no_split_modules)
        return {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": blocks}}
    if engine is None:
        return {}
    return {"deepspeed": str(Path(__file__).with_name("deepspeed") / f"{engine}.json")}


def run(
    recipe: Recipe, out: Path, *, tiny: bool = False, engine: str | None = None, stop_after: int | None = None
) -> EllaRegularizer:
    """Every task that ``out`` does not have yet, at most ``stop_after`` of them."""
    state, path = PartialState(cpu=tiny), recipe.model
    if tiny:
        path = str(out / "tiny_model")
        if state.is_main_process and not (out / "tiny_model" / "tokenizer.json").is_file():
            save_tiny(recipe, Path(path))
        state.wait_for_everyone()
    tasks = tiny_tasks() if tiny else read_tasks(recipe)
    tokenizer, model = load(recipe, path)
    reg = _regularizer(model, EllaConfig(**recipe.ella), out)
    if reg.tasks != list(tasks)[: len(reg.tasks)]:
        raise ValueError(f"{out} has finished the tasks {reg.tasks}, the recipe's are {list(tasks)}; use another --out")
    is_seq2seq = bool(model.config.is_encoder_decoder)
    settings = {**recipe.training, **(_TINY_TRAINING if tiny else {}), **engine_settings(engine, model)}
    for name in list(tasks)[len(reg.tasks) :][:stop_after]:
        # The task starts from the same adapter whether or not the run was stopped before it.
        set_seed(recipe.seed + len(reg.tasks))
        reg.reset_adapter()
        checkpoints = out / "checkpoints" / name
        arguments = TrainingArguments(output_dir=str(checkpoints), seed=recipe.seed, **settings)
        trainer = Trainer(
            model,
            arguments,
            train_dataset=encoded(tokenizer, tasks[name], recipe.max_length, is_seq2seq),
            data_collator=DataCollatorForSeq2Seq(tokenizer),
            processing_class=tokenizer,
        )
        attach(trainer, reg)
        trainer.train(resume_from_checkpoint=get_last_checkpoint(str(checkpoints)) if checkpoints.is_dir() else None)
        report = reg.end_task(name)
        folder = out / f"after-{len(reg.tasks)}-{name}"
        trainer.save_model(str(folder))
        state.wait_for_everyone()
        if state.is_main_process:
            text = json.dumps({"tasks": reg.tasks, "error": report.max_relative_error})
            (folder / FINISHED).write_text(text, encoding="utf-8")
            print(f"{name}: folded, largest relative error {report.max_relative_error:.1e}; {folder}")
        state.wait_for_everyone()
    return reg


def _regularizer(model: PeftModel, config: EllaConfig, out: Path) -> EllaRegularizer:
    """As the last finished task left it, or fresh."""
    done = {len(json.loads(path.read_text())["tasks"]): path.parent for path in out.glob(f"after-*/{FINISHED}")}
    return EllaRegularizer.from_pretrained(model, done[max(done)], config) if done else EllaRegularizer(model, config)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--tiny", action="store_true", help="a small random model and made-up texts, on the CPU")
    parser.add_argument("--out", type=Path, help="output folder (default: the recipe's)")
    parser.add_argument("--engine", choices=ENGINES, help="under torchrun (default: the launcher's, or DDP)")
    parser.add_argument("--stop-after", type=int, metavar="N", help="finish at most N tasks, then stop")
    given = parser.parse_args(arguments)
    recipe = Recipe.read(given.recipe)
    out = given.out or Path(recipe.out)
    run(recipe, out, tiny=given.tiny, engine=given.engine, stop_after=given.stop_after)
    return 0


if __name__ == "__main__":
    sys.exit(main())
