"""The methods of a stream: each formula and gradient against a dense float64 one, and what each carries."""

from __future__ import annotations

import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from ella.continual.arms import ARMS, nlora, task_seed
from ella.continual.arms.lines import depth_of
from ella.continual.arms.replay import balanced_rows
from ella.continual.arms.slao import orthonormal_rows
from ella.continual.models import LoraSettings, build_classifier
from ella.continual.stream import StreamConfig, run_stream
from ella.lora import adapted_layers

from . import tiny

TASKS = tiny.three_tasks(n_train=16, n_test=8)
LORA = LoraSettings(r=4, alpha=8)
SCALING = 2.0
ONE, FRESH = ("seqlora", "ewc", "slao", "replay"), ("inclora", "olora", "lines")  # by what they are without their term


def begun(model, name: str, lora: LoraSettings = LORA, **settings):
    """The method before its first task, with the records of ``TASKS``."""
    classifier = build_classifier(model, lora=lora)
    encoded = [classifier.encode(task.train, task.labels) for task in TASKS]
    arm = StreamConfig(arm=name, settings=settings).make_arm(classifier, lambda i: encoded[i])
    arm.n_tasks = len(TASKS)
    arm.begin()
    return arm


def factors(arm) -> dict[str, tuple[torch.nn.Parameter, torch.nn.Parameter]]:
    return {layer.name: layer.parameters() for layer in adapted_layers(arm.model, arm.adapter)}


def scramble(arm, seed: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """As if trained: random factors, returned in float64."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for pair in factors(arm).values():
            for p in pair:
                p.normal_()
    return {name: (a.detach().double(), b.detach().double()) for name, (a, b) in factors(arm).items()}


def task(arm, index: int) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Task ``index`` with random factors for training; returns them."""
    arm.before_task(index)
    found = scramble(arm, index)
    arm.after_task(index, str(index))
    return found


def output(arm) -> torch.Tensor:
    encoded = arm.train(0)
    with torch.no_grad():
        return arm.classifier.embed(encoded.tokens[:4])


def error(found, wanted) -> float:
    found, wanted = (torch.cat([t.detach().double().flatten() for t in ts]) for ts in (found, wanted))
    assert wanted.norm() > 0
    return float((found - wanted).norm() / wanted.norm())


def gradients(arm, index: int):
    """(term, gradients of A and B) on top of a gradient of ones, which must stay."""
    parameters = [p for pair in factors(arm).values() for p in pair]
    for p in parameters:
        p.grad = torch.ones_like(p)
    term = arm.extra_gradient(index)
    assert term.shape == () and not term.requires_grad
    return term, [p.grad - 1 for p in parameters]


def dense(pairs, formula):
    """(value, gradients) of ``formula(name, A, B)`` summed over layers, in float64."""
    leaves = {name: tuple(t.clone().requires_grad_() for t in pair) for name, pair in pairs.items()}
    value = sum(formula(name, a, b) for name, (a, b) in leaves.items())
    grads = torch.autograd.grad(value, [t for pair in leaves.values() for t in pair], materialize_grads=True)
    return value, grads


def test_olora_is_its_formula(bert):
    arm = begun(bert, "olora", strength=0.3)
    assert arm.extra_gradient(0) is None
    earlier = [task(arm, 0), task(arm, 1)]
    arm.before_task(2)
    now = scramble(arm, 2)
    term, found = gradients(arm, 2)
    value, wanted = dense(now, lambda name, a, _: 0.3 * sum((old[name][0] @ a.T).abs().sum() for old in earlier))
    assert error([term], [value]) < 1e-5 and error(found, wanted) < 1e-5
    # An A of every layer and task is carried, beside the past.
    carried = sum(t.numel() for t in arm.tensors().values())
    assert carried == 2 * sum(a.numel() for a, _ in now.values())
    assert arm.state_bytes() > 4 * carried


@pytest.mark.parametrize("entries", [1 << 22, 256])
def test_nlora_is_its_formula_on_narrow_keys(llama, monkeypatch, entries):
    """Layers of 64 x 64 and of 32 x 64, at once and in blocks of four rows."""
    monkeypatch.setattr(nlora, "ENTRIES", entries)
    arm = begun(llama, "nlora", LoraSettings(r=4, alpha=8, target_modules=("q_proj", "v_proj")), strength=0.3)
    arm.before_task(0)
    now = scramble(arm, 0)
    assert {tuple(b.shape) for _, b in now.values()} == {(64, 4), (32, 4)}
    term, found = gradients(arm, 0)
    value, wanted = dense(now, lambda _, a, b: 0.3 * (SCALING * b @ a).abs().sum())
    assert error([term], [value]) < 1e-5 and error(found, wanted) < 1e-5


def fisher_by_hand(arm, index: int, batch: int, n: int) -> dict[str, torch.Tensor]:
    encoded, total = arm.train(index), {}
    chosen = list(encoded.batches(batch, task_seed(0, index)))[:n]
    for rows in chosen:
        arm.model.zero_grad()
        arm.classifier.loss(encoded, rows).backward()
        for name, p in arm.model.named_parameters():
            if p.grad is not None:
                total[name] = total.get(name, 0) + p.grad.double().square() / len(chosen)
    arm.model.zero_grad()
    return total


def test_ewc_is_its_formula(bert):
    arm = begun(bert, "ewc", strength=3.0, decay=0.5, fisher_batches=5, fisher_batch=2)
    assert arm.extra_gradient(0) is None and arm.state_bytes() == 0
    task(arm, 0)
    first = fisher_by_hand(arm, 0, 2, 5)
    task(arm, 1)
    second = fisher_by_hand(arm, 1, 2, 5)
    fisher = {name: 0.5 * first[name] + second[name] for name in second}
    assert arm.fisher.keys() == fisher.keys() and len(fisher) == 8
    assert error(arm.fisher.values(), fisher.values()) < 1e-5

    anchor = {name: p.detach().double() for name, p in arm.model.named_parameters() if p.requires_grad}
    arm.before_task(2)
    scramble(arm, 5)
    now = {name: p.detach().double() for name, p in arm.model.named_parameters() if p.requires_grad}
    term, found = gradients(arm, 2)
    value = sum(1.5 * (fisher[name] * (now[name] - anchor[name]).square()).sum() for name in now)
    wanted = [3.0 * fisher[name] * (now[name] - anchor[name]) for name in now]
    assert error([term], [value]) < 1e-5 and error(found, wanted) < 1e-5
    assert arm.state_bytes() == 2 * 4 * sum(t.numel() for t in now.values())


def test_replay_adds_the_mean_loss_of_what_it_draws(bert):
    arm = begun(bert, "replay", buffer=6, batch=100, strength=0.5)
    for index in (0, 1):
        arm.before_task(index)
        arm.after_task(index, "")
    assert [len(rows) for _, rows in arm.buffers] == [6, 6] and arm.tensors() == {}
    tokens = [arm.train(j).tokens[row] for j in (0, 1) for row in arm.buffers[j][1]]
    assert arm.state_bytes() == 4 * sum(len(t) + 1 for t in tokens)
    arm.before_task(2)
    scramble(arm, 2)
    # Twelve examples are all there are: the whole memory, six of each task.
    loss = sum(0.5 * 0.5 * arm.classifier.loss(*buffer) for buffer in arm.buffers)
    wanted = torch.autograd.grad(loss, [p for pair in factors(arm).values() for p in pair])
    term, found = gradients(arm, 2)
    assert error([term], [loss]) < 1e-5 and error(found, wanted) < 1e-5


def test_replay_draws_by_seed_and_task(bert):
    one, other = (begun(bert, "replay", batch=3) for _ in range(2))
    one.after_task(0, "things")
    other.restore(["things"], {})
    assert one.buffers[0][1] == other.buffers[0][1]
    drawn = []
    for arm in (one, other, other):
        seen = []
        arm.classifier.loss = lambda _, rows, seen=seen: seen.append(rows) or torch.zeros((), requires_grad=True)
        arm.before_task(1)
        for _ in range(3):
            arm.extra_gradient(1)
        drawn.append(seen)
    assert drawn[0] == drawn[1] == drawn[2] and drawn[0][0] != drawn[0][1]
    other.before_task(2)
    other.extra_gradient(2)
    assert drawn[2][-1] != drawn[2][0]


def test_buffers_have_as_many_of_each_class(bert):
    encoded = begun(bert, "replay").train(0)
    for n in (1, 5, 8, 16, 99):
        rows = balanced_rows(encoded, n, seed=3)
        counts = [sum(encoded.targets[row] == label for row in rows) for label in (0, 1)]
        assert len(set(rows)) == len(rows) == min(n, 16) and abs(counts[0] - counts[1]) <= 1
    assert balanced_rows(encoded, 8, seed=3) != balanced_rows(encoded, 8, seed=4)


def test_slao_starts_and_merges_as_its_algorithm_says(bert):
    arm = begun(bert, "slao")
    merged = {name: b for name, (_, b) in task(arm, 0).items()}
    last = {name: (a.detach().double(), b.detach().double()) for name, (a, b) in factors(arm).items()}
    assert all(torch.equal(last[name][1], b) for name, b in merged.items())
    for index in (1, 2):
        arm.before_task(index)
        for name, pair in factors(arm).items():
            a, b = (p.detach().double() for p in pair)
            assert torch.equal(b, last[name][1])
            # Orthonormal, and row k in the span of the first k rows of the last A, on their side.
            assert error([a @ a.T], [torch.eye(4)]) < 1e-5
            triangle = last[name][0] @ a.T
            assert error([triangle @ a], [last[name][0]]) < 1e-5
            assert triangle.triu(1).norm() < 1e-4 and (triangle.diagonal() > 0).all()
        trained = scramble(arm, index)
        arm.after_task(index, "")
        merged = {name: b + (trained[name][1] - b) / math.sqrt(index + 1) for name, b in merged.items()}
        after = factors(arm)
        assert error([after[name][1] for name in merged], merged.values()) < 1e-6
        assert all(torch.equal(after[name][0].double(), trained[name][0]) for name in merged)
        last = trained
        # B as fine-tuned, of one task.
        assert error(arm.tensors().values(), [b for _, b in last.values()]) < 1e-7
        assert arm.state_bytes() == 4 * sum(b.numel() for b in merged.values())


def test_a_row_of_zeros_stays_orthonormal():
    a = torch.eye(3, 5)
    a[1] = 0
    q = orthonormal_rows(a)
    assert torch.allclose(q @ q.T, torch.eye(3), atol=1e-6) and torch.equal(q[0], a[0])


def test_slao_needs_a_rank_that_fits(bert):
    arm = begun(bert, "slao", LoraSettings(r=33))
    task(arm, 0)
    with pytest.raises(ValueError, match=r"layer\.0.*query has A of shape \(33, 32\).*a rank of at most 32"):
        arm.before_task(1)


def test_lines_scales_each_block_before_it_is_folded(bert):
    arm = begun(bert, "lines", shallow=0.25)
    trained = task(arm, 0)
    for layer in adapted_layers(arm.model, "default"):
        a, b = (p.detach().double() for p in layer.parameters())
        factor = {"0": 0.25, "1": 1.0}[layer.name.split(".")[2]]
        old = trained[layer.name]
        assert error([layer.scaling() * b @ a], [factor * SCALING * old[1] @ old[0]]) < 1e-5


def test_depth_is_read_from_the_name(t5):
    blocks = torch.nn.ModuleList(torch.nn.ModuleDict({"q": torch.nn.Identity()}) for _ in range(5))
    root = torch.nn.ModuleDict({"layers": blocks, "head": torch.nn.Sequential(torch.nn.Identity())})
    assert [depth_of(root, f"layers.{i}.q") for i in range(5)] == [0, 0.25, 0.5, 0.75, 1]
    assert depth_of(root, "head.0") == depth_of(root, "head") == 1.0
    assert depth_of(torch.nn.ModuleDict({"h": blocks[:1]}), "h.0.q") == 1.0
    # The block, not what is numbered inside of it; encoder and decoder each from their first.
    model = build_classifier(t5, lora=LORA).model.base_model.model
    assert depth_of(model, "decoder.block.0.layer.1.EncDecAttention.q") == 0.0
    assert depth_of(model, "encoder.block.1.layer.0.SelfAttention.q") == 1.0


def trained_osf(model):
    arm = begun(model, "osf")
    arm.before_task(0)
    optimizer = torch.optim.AdamW([p for p in arm.model.parameters() if p.requires_grad], lr=1e-2)
    encoded = arm.train(0)
    for _ in range(3):
        optimizer.zero_grad()
        arm.classifier.loss(encoded, range(8)).backward()
        optimizer.step()
    return arm


def test_osf_keeps_what_was_learned(bert):
    start = begun(bert, "osf")
    untrained = output(start)
    arm = trained_osf(bert)
    trained = output(arm)
    arm.after_task(0, "things")
    assert error([trained], [untrained]) > 0.01 and error([output(arm)], [trained]) < 1e-6
    assert not any("lora" in name or "osf" in name for name, _ in arm.model.named_parameters())
    tensors = arm.tensors()
    size = 4 * 4 * 32 * 32
    assert len(tensors) == 4 and arm.state_bytes() == size and arm.dense_bytes() == (size, 4)
    # Another process goes on from there, and splits what was merged.
    start = begun(bert, "osf")
    resumed = StreamConfig(arm="osf").make_arm(build_classifier(bert, lora=LORA), start.train)
    resumed.resume(["things"], None, {name: t.clone() for name, t in tensors.items()})
    assert torch.equal(output(resumed), output(arm))
    resumed.before_task(1)
    assert error([output(resumed)], [trained]) < 1e-5
    trainable = [p for p in resumed.model.parameters() if p.requires_grad]
    assert len(trainable) == 3 * 4 and {tuple(p.shape) for p in trainable} == {(32, 16), (16,), (16, 32)}


def test_osf_moves_only_what_is_not_preserved(bert):
    """A plain gradient step: nothing of the weight's upper directions is in the update's."""
    arm = begun(bert, "osf", preserved=0.25)
    before = {name: w.detach().double() for name, w in arm.tensors().items()}
    arm.before_task(0)
    arm.classifier.loss(arm.train(0), range(8)).backward()
    with torch.no_grad():
        for p in arm.model.parameters():
            if p.grad is not None:
                p.sub_(0.1 * p.grad)
    arm.after_task(0, "")
    for name, w in arm.tensors().items():
        u, s, v = torch.linalg.svd(before[name])
        update = w.detach().double() - before[name]
        assert update.norm() > 1e-4 * before[name].norm()
        assert (u[:, :8].T @ update).norm() < 1e-5 * s[0] and (update @ v[:8].T).norm() < 1e-5 * s[0]


def test_osf_says_which_layer_it_cannot_train(tmp_path):
    gpt2 = tiny.save_gpt2(tmp_path, positions=64)
    for target, message in (("c_attn", r"h\.0\.attn\.c_attn is a Conv1D"), ("lm_head", "lm_head is another module's")):
        classifier = build_classifier(gpt2, kind="causal", max_length=32, lora=LoraSettings(target_modules=(target,)))
        arm = StreamConfig(arm="osf").make_arm(classifier, lambda i: None)
        with pytest.raises(ValueError, match=message):
            arm.begin()


def streamed(model, name: str, tasks=TASKS[:2], **settings):
    classifier = build_classifier(model, lora=LORA)
    config = StreamConfig(arm=name, settings=settings, batch_size=8, learning_rate=1e-2, epochs=2)
    return classifier, run_stream(classifier, tasks, config, progress=False, untrained=[0.0] * len(tasks))


@pytest.fixture(scope="module")
def streams(bert):
    return {name: streamed(bert, name) for name in (*ONE, *FRESH, "nlora", "osf")}


@pytest.mark.parametrize(
    "name, off, without",
    [
        ("olora", {"strength": 0}, "inclora"),
        ("nlora", {"strength": 0}, "inclora"),
        ("lines", {"shallow": 1}, "inclora"),
        ("ewc", {"strength": 0}, "seqlora"),
        ("replay", {"strength": 0}, "seqlora"),
    ],
)
def test_switched_off_it_is_the_method_without_it(bert, streams, name, off, without):
    (classifier, result), (other, reference) = streamed(bert, name, **off), streams[without]
    ours, theirs = (dict(c.model.named_parameters()) for c in (classifier, other))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(p, theirs[key]) for key, p in ours.items())
    assert result.matrix.to_dict() == reference.matrix.to_dict()


def test_the_first_task_is_the_same_where_nothing_is_added_to_it(streams):
    losses = {name: result.tasks[0]["loss"] for name, (_, result) in streams.items()}
    same = {losses.pop(name) for name in (*ONE, *FRESH)}
    assert len(same) == 1 and not same & {*losses.values()}


def test_what_each_adds_reaches_the_second_task(streams):
    for group in (ONE, FRESH):
        theirs = dict(streams[group[0]][0].model.named_parameters())
        for name in group[1:]:
            classifier, result = streams[name]
            assert any(not torch.equal(p, theirs[key]) for key, p in classifier.model.named_parameters()), name
            assert (result.tasks[1]["penalty"] > 0) == (name in ("olora", "ewc", "replay")), name


@pytest.mark.parametrize(
    "name, settings, message",
    [
        ("olora", {"strength": -1}, "strength is -1; expected a finite number of at least 0"),
        ("nlora", {"strength": True}, "strength is True; expected a finite number"),
        ("lines", {"shallow": 1.5}, "shallow is 1.5; expected a number of 0 to 1"),
        ("lines", {"shallow": "0.5"}, "shallow is '0.5'; expected a finite number"),
        ("ewc", {"decay": math.inf}, "decay is inf; expected a finite number"),
        ("ewc", {"fisher_batches": 0}, "fisher_batches is 0; expected an integer of at least 1"),
        ("ewc", {"fisher_batch": 1.5}, "fisher_batch is 1.5; expected an integer"),
        ("replay", {"buffer": 0}, "buffer is 0; expected an integer of at least 1"),
        ("replay", {"batch": "many"}, "batch is 'many'; expected an integer"),
        ("osf", {"preserved": 1}, "preserved is 1; expected a finite number above 0 and below 1"),
        ("slao", {"strength": 1}, r"arm 'slao' has no settings \['strength'\]; known are \[\]"),
        ("olora", {"ella_lambda": 1.0}, r"no settings \['ella_lambda'\]; known are \['keep_past', 'past_rank', 'stren"),
    ],
)
def test_settings_are_checked(name, settings, message):
    with pytest.raises(ValueError, match=message):
        StreamConfig(arm=name, settings=settings)


def test_the_page_of_the_methods_has_them_all():
    text = (Path(__file__).parents[2] / "docs" / "continual.md").read_text(encoding="utf-8")
    rows = {row[1]: row[0] for row in re.finditer(r"^\| `(\w+)` \|.*$", text, re.MULTILINE)}
    assert list(rows) == list(ARMS)
    for name, kind in ARMS.items():
        for f in fields(kind.Settings):
            assert f"`{f.name}` {f.default:g}" in rows[name], (name, f.name)
        for source in re.findall(r"arXiv (\d+\.\d+)", kind.__doc__ or ""):
            assert source in rows[name], (name, source)
