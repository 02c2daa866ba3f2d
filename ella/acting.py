"""How finished tasks act beside the task in training, in one forward and in one merge.

The knowledge adapter (the name the user gave, "default") holds all finished tasks as a plain LoRA of scaling 1; the
trained adapter is :data:`TASK`, alone active for PEFT. Through PEFT's own extension point, a ``LoraVariant`` on both,
the trained adapter brings the knowledge along wherever it acts or is merged. Where adapters are disabled a forward hook
of the LoRA layer (never of the base layer: what PEFT unloads takes its hook with it) adds the knowledge, which makes
``disable_adapter()`` the model before the current task. Layers that know no variants (attention modules, expert
parameters, some quantised bases) get a subclass that does the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Embedding, LoraVariant, MultiheadAttention, ParamWrapper
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["TASK", "TogetherVariant", "act_together", "release"]

TASK = "ella_task"


class TogetherVariant(LoraVariant):
    """PEFT's forward, merge and unmerge of the trained or the knowledge adapter of one layer.

    Args:
        knowledge: name of the knowledge adapter.
        in_base: whether its update is in the base weight already (``keep_past="merge"``), so that it adds nothing.
        merged_by_twin: whether merging the layer that this one is tied to merges it too: one weight, one update.
        unmergeable: why merging would be wrong, or None.

    ``ran`` is set by every forward: a kernel that computes LoRA past the layer never sets it.
    """

    def __init__(
        self, knowledge: str, in_base: bool = False, merged_by_twin: bool = False, unmergeable: str | None = None
    ) -> None:
        self.knowledge = knowledge
        self.in_base = in_base
        self.merged_by_twin = merged_by_twin
        self.unmergeable = unmergeable
        self.ran = False

    def init(self, module: LoraLayer, adapter_name: str, **kwargs: Any) -> None:
        """Nothing to prepare."""

    def forward(self, module: LoraLayer, active_adapter: str, x: Tensor, result: Tensor, **kwargs: Any) -> Tensor:
        self.ran = True
        # Both active: each acts for itself. A mixed batch names its adapters whatever is active.
        alone = TASK in module.active_adapters and self.knowledge in module.active_adapters
        return add_updates(module, result, x, self._adapters(module, active_adapter, alone))

    def merge_safe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        merged = self._shifted(module, active_adapter, orig_weight, 1)
        if merged.isfinite().all():  # else PEFT refuses, and the bias stays as it was
            self._shift_bias(module, active_adapter, 1)
        return merged

    def merge_unsafe(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> None:
        # In place: other parameters may share the storage.
        orig_weight.data.copy_(self._shifted(module, active_adapter, orig_weight.data, 1))
        self._shift_bias(module, active_adapter, 1)

    def unmerge(self, module: LoraLayer, active_adapter: str, orig_weight: Tensor) -> Tensor:
        self._shift_bias(module, active_adapter, -1)
        return self._shifted(module, active_adapter, orig_weight.data, -1)

    def _adapters(self, module: LoraLayer, active_adapter: str, alone: bool) -> list[str]:
        """The adapters that act when ``active_adapter`` does; ``alone``: the other of the two acts for itself."""
        if active_adapter == self.knowledge:
            return [] if self.in_base else [active_adapter]
        brings = not (self.in_base or alone) and self.knowledge in module.scaling
        return [self.knowledge, active_adapter] if brings else [active_adapter]

    def _merged_with(self, module: LoraLayer, active_adapter: str) -> list[str]:
        # PEFT appends to merged_adapters after a merge and pops before an unmerge, last first: both see the same list.
        if self.merged_by_twin or (active_adapter == self.knowledge and TASK in module.merged_adapters):
            return []
        return self._adapters(module, active_adapter, self.knowledge in module.merged_adapters)

    def _shifted(self, module: LoraLayer, active_adapter: str, weight: Tensor, sign: int) -> Tensor:
        if self.unmergeable and sign > 0:
            raise ValueError(self.unmergeable)
        deltas = [module.get_delta_weight(name) for name in self._merged_with(module, active_adapter)]
        if not deltas:
            return weight
        # One sum and one rounding, however many adapters.
        total = deltas[0] if len(deltas) == 1 else deltas[0].float() + deltas[1].float()
        shifted = torch.add(weight, total.to(weight.device), alpha=sign)
        # A quantised base gives its weight dequantised, and rounds what it gets itself.
        return shifted.to(weight.dtype) if weight.dtype == module.get_base_layer().weight.dtype else shifted

    def _shift_bias(self, module: LoraLayer, active_adapter: str, sign: int) -> None:
        # PEFT itself adds and takes away the bias of ``active_adapter``: here is only the difference.
        merged = self._merged_with(module, active_adapter)
        for name in {active_adapter, self.knowledge}:
            count = (name in merged) - (name == active_adapter)
            if count and module.lora_bias.get(name):
                bias = module.lora_B[name].bias * module.scaling[name]
                module.get_base_layer().bias.data += sign * count * bias


# --- the sum of both updates -----------------------------------------------------------------------------------------


def add_updates(module: LoraLayer, result: Tensor, x: Tensor, adapters: Sequence[str]) -> Tensor:
    """``result + Σ scaling · B(A(dropout(x)))`` over one or two ``adapters`` of a layer, the trained one last."""
    if isinstance(module, Embedding):
        for name in adapters:
            found = module._embed(x, module.lora_embedding_A[name].T) @ module.lora_embedding_B[name].T
            scale = module._get_embed_scale()
            found = found * module.scaling[name]
            result = result + (found if scale is None else found * scale.to(found.dtype))
        return result
    factors = _factors(module, x, *adapters) if len(adapters) == 2 else None
    if factors is not None:
        return _add_both(module, result, x, factors, *adapters)
    for name in adapters:
        lora_A, lora_B = module.lora_A[name], module.lora_B[name]
        inputs = module.lora_dropout[name](module._cast_input_dtype(x, lora_A.weight.dtype))
        found = lora_B(lora_A(inputs))
        # Of the knowledge it is 1: a pass over the output saved.
        result = result + (found if module.scaling[name] == 1 else found * module.scaling[name])
    return result


def _factors(module: LoraLayer, x: Tensor, knowledge: str, task: str) -> list[Tensor] | None:
    """``[Aₖ, Bₖ, Aₜ, Bₜ]``; None unless all are tensors in reach (no hook loads or replaces any) and the knowledge is
    frozen, with scaling 1.
    """
    if module.scaling[knowledge] != 1 or not x.is_floating_point():
        return None
    found: list[Tensor] = []
    device = x.device
    for name in (knowledge, task):
        for holder in (module.lora_A[name], module.lora_B[name]):
            if type(holder) is not nn.Linear or holder._forward_hooks or holder._forward_pre_hooks:
                return None
            weight = holder.weight
            if type(weight) is not nn.Parameter or weight.device != device or "forward" in holder.__dict__:
                return None
            found.append(weight)
    return None if found[0].requires_grad or found[1].requires_grad else found


def _add_both(module: LoraLayer, result: Tensor, x: Tensor, factors: list[Tensor], knowledge: str, task: str) -> Tensor:
    dropout, scaling, dtype = module.lora_dropout[task], module.scaling[task], _product_dtype(x)
    dropped = x if isinstance(dropout, nn.Identity) or not dropout.training else dropout(x)
    a_k, b_k, a_t, b_t = factors
    # Joining the factors for few rows, as in decoding, would cost as much as their products.
    few = x.numel() <= (a_k.shape[0] + a_t.shape[0]) * x.shape[-1]
    if few or dropped is not x:
        result = _add_apart(result, x, dropped, a_k, b_k, a_t, b_t, scaling, dtype)
    elif torch.is_grad_enabled() and any(t.requires_grad for t in (result, x, a_t, b_t)):
        result = _AddJoined.apply(result, x, a_k, b_k, a_t, b_t, scaling, dtype)
    else:
        result, _, _ = _add_joined(result, x, a_k, b_k, a_t, b_t, scaling, dtype)
    for name in (knowledge, task):
        bias = module.lora_B[name].bias
        if bias is not None:
            result = result + bias * module.scaling[name]
    return result


def _product_dtype(x: Tensor) -> torch.dtype:
    """In which a linear map of ``x`` is computed; autocast leaves float64 alone."""
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and x.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else x.dtype


def _add_apart(
    result: Tensor, x: Tensor, dropped: Tensor, a_k: Tensor, b_k: Tensor, a_t: Tensor, b_t: Tensor, scaling: float,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """``result + x Aₖᵀ Bₖᵀ + s · dropped Aₜᵀ Bₜᵀ``, adapter by adapter, differentiated by plain autograd."""
    a_k, b_k, a_t, b_t = (t if t.dtype == dtype else t.to(dtype) for t in (a_k, b_k, a_t, b_t))
    added, rows = _copy(result.reshape(-1, result.shape[-1]), dtype), _rows(x, dtype)
    rows_t = rows if dropped is x else _rows(dropped, dtype)
    _add_product(added, F.linear(rows, a_k), b_k)
    _add_product(added, F.linear(rows_t, a_t), b_t, scaling)
    return added.view(result.shape)


def _add_joined(
    result: Tensor, x: Tensor, a_k: Tensor, b_k: Tensor, a_t: Tensor, b_t: Tensor, scaling: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """``result + x Aₖᵀ Bₖᵀ + s · x Aₜᵀ Bₜᵀ`` by one product with ``x`` and one that adds, and what led to it.

    Returns:
        The sum, the rows of ``x`` ``(n, in)`` and ``s · x Aₜᵀ`` ``(n, r)``.
    """
    rows = _rows(x, dtype)
    # [n, k + r]
    hidden = F.linear(rows, _joined(a_k, a_t, 0, dtype))
    hidden_t = hidden[:, a_k.shape[0] :].mul_(scaling)
    # No view is returned: of an autograd.Function it could not be changed in place (an activation after the layer).
    added = _copy(result, dtype)
    _add_product(added.view(-1, added.shape[-1]), hidden, _joined(b_k, b_t, 1, dtype))
    return added, rows, hidden_t


def _rows(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.reshape(-1, x.shape[-1]).to(dtype)


def _copy(result: Tensor, dtype: torch.dtype) -> Tensor:
    """``result``, contiguous, for adding products in ``dtype`` to: in the wider dtype of both."""
    wider = torch.promote_types(result.dtype, dtype)
    return result.to(wider, copy=True, memory_format=torch.contiguous_format)


def _joined(known: Tensor, trained: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
    return torch.cat((known, trained), dim).to(dtype)


def _add_product(added: Tensor, hidden: Tensor, b: Tensor, scaling: float = 1.0) -> None:
    if added.dtype == b.dtype:
        added.addmm_(hidden, b.T, alpha=scaling)
    else:
        added.add_(hidden @ b.T, alpha=scaling)


class _AddJoined(torch.autograd.Function):
    """:func:`_add_joined` with gradients for ``result``, ``x`` and the trained factors.

    By plain autograd the frozen factors of the knowledge, being joined with trained ones, get gradients that nobody
    wants. Saved is what plain LoRA saves: ``x``, itself where its dtype allows, and ``(n, r)`` of its products.
    """

    @staticmethod
    def forward(
        ctx: Any, result: Tensor, x: Tensor, a_k: Tensor, b_k: Tensor, a_t: Tensor, b_t: Tensor, scaling: float,
        dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        added, rows, hidden_t = _add_joined(result, x, a_k, b_k, a_t, b_t, scaling, dtype)
        ctx.scaling, ctx.dtype, ctx.x_dtype, ctx.x_shape = scaling, dtype, x.dtype, x.shape
        *_, needs_a, needs_b, _, _ = ctx.needs_input_grad
        # Not the view, which would keep the (n, k) beside it alive.
        kept = hidden_t.contiguous() if needs_b else None
        ctx.save_for_backward(rows if needs_a else None, kept, a_k, b_k, a_t, b_t)
        return added

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, hidden_t, a_k, b_k, a_t, b_t = ctx.saved_tensors
        k, dtype = a_k.shape[0], ctx.dtype
        _, needs_x, *_, needs_a, needs_b, _, _ = ctx.needs_input_grad
        grad_x = grad_a = grad_b = None
        with torch.autocast(grad.device.type, enabled=False):
            flat = _rows(grad, dtype)
            if needs_b:
                grad_b = (flat.T @ hidden_t).to(b_t.dtype)
            if needs_x:
                # [n, k + r]
                back = flat @ _joined(b_k, b_t, 1, dtype)
                back_t = back[:, k:].mul_(ctx.scaling)
                # Not a view of rows: autograd adds the base layer's gradient to it in place.
                back = back.view(*ctx.x_shape[:-1], back.shape[1])
                grad_x = torch.matmul(back, _joined(a_k, a_t, 0, dtype)).to(ctx.x_dtype)
            elif needs_a:
                back_t = (flat @ b_t.to(dtype)).mul_(ctx.scaling)
            if needs_a:
                grad_a = (back_t.T @ rows).to(a_t.dtype)
        return grad, grad_x, None, None, grad_a, grad_b, None, None


# --- adapters disabled, and layers without variants ------------------------------------------------------------------


class PreviousModel:
    """Forward hook of a LoRA layer: where adapters are disabled, the finished tasks still act.

    With ``always`` also where the trained adapter is active: for layers whose forward knows no variants.
    """

    def __init__(self, knowledge: str, always: bool = False) -> None:
        self.knowledge = knowledge
        self.always = always

    def __call__(self, module: LoraLayer, args: tuple, kwargs: dict, output: Tensor) -> Tensor | None:
        if TASK not in module.scaling or self.knowledge not in module.scaling:
            release(module)
            return None
        active = module.active_adapters
        brings = self.always and TASK in active and self.knowledge not in active and not module.merged
        if not (brings or _is_off(module, self.knowledge)):
            return None
        x = args[0] if args else next(iter(kwargs.values()))
        return add_updates(module, output, x, [self.knowledge]).to(output.dtype)


class PreviousModule:
    """The same for a module that PEFT trains as a whole (``modules_to_save``): the copy of the last finished task."""

    def __init__(self, knowledge: str) -> None:
        self.knowledge = knowledge

    def __call__(self, module: ModulesToSaveWrapper, args: tuple, kwargs: dict, output: Any) -> Any:
        if TASK not in module.modules_to_save or self.knowledge not in module.modules_to_save:
            release(module)
            return None
        return module.modules_to_save[self.knowledge](*args, **kwargs) if _is_off(module, self.knowledge) else None


def _is_off(module: LoraLayer | ModulesToSaveWrapper, knowledge: str) -> bool:
    """Whether ELLA's adapters are disabled; beside another one that is active they do not act anyway."""
    return module.disable_adapters and any(name in (TASK, knowledge) for name in module.active_adapters)


# A mixin may use whatever PEFT's layers have: to a type checker they are anything.
_PeftLayer: Any = object


class _Together(_PeftLayer):
    """Mixin of subclasses of PEFT layers whose merges know no variants: the trained adapter brings the knowledge."""

    ella_knowledge: str
    # While merging: the module whose list of merged adapters says what is merged already.
    _merging: LoraLayer | None = None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        with self._bringing():
            super().merge(safe_merge=safe_merge, adapter_names=adapter_names)

    def unmerge(self) -> None:
        with self._bringing():
            super().unmerge()

    def get_delta_weight(self, adapter: str, *args: Any, **kwargs: Any) -> Tensor:
        """PEFT's, and while merging what merging ``adapter`` adds: with the knowledge unless that is merged itself."""
        delta = super().get_delta_weight(adapter, *args, **kwargs)
        if self._merging is None:
            return delta
        merged = self._merging.merged_adapters
        if adapter == self.ella_knowledge and TASK in merged:
            return torch.zeros_like(delta)
        if self._together([adapter]) == [adapter] or self.ella_knowledge in merged:
            return delta
        return delta + super().get_delta_weight(self.ella_knowledge, *args, **kwargs)

    @contextlib.contextmanager
    def _bringing(self) -> Iterator[None]:
        modules = [self, *_inner(self)]
        before = [module._merging for module in modules]
        try:
            for module in modules:
                module.__dict__["_merging"] = self  # not as a submodule
            yield
        finally:
            for module, merging in zip(modules, before, strict=True):
                module.__dict__["_merging"] = merging

    def _together(self, names: list[str]) -> list[str]:
        """``names`` with the knowledge in front where the trained adapter is among them and the knowledge is not."""
        known = self.ella_knowledge
        return [known, *names] if TASK in names and known in self.scaling and known not in names else names


def _inner(module: LoraLayer) -> list[LoraLayer]:
    """The LoRA layer of an attention module's output projection, which goes with it."""
    inner = getattr(module.base_layer, "out_proj", None)
    return [inner] if isinstance(inner, LoraLayer) else []


class _TogetherForward(_Together):
    """Also its forward: with adapters disabled the knowledge acts alone."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        known = self.ella_knowledge
        if not _is_off(self, known) or TASK not in self.scaling or known not in self.scaling:
            return super().forward(x, *args, **kwargs)
        if self.merged:
            self.unmerge()
        with self._alone(known):
            return super().forward(x, *args, **kwargs)

    @contextlib.contextmanager
    def _alone(self, adapter: str) -> Iterator[None]:
        modules = [self, *_inner(self)]
        before = [(module._active_adapter, module._disable_adapters) for module in modules]
        try:
            for module in modules:
                module._active_adapter, module._disable_adapters = [adapter], False
            yield
        finally:
            for module, (active, disabled) in zip(modules, before, strict=True):
                module._active_adapter, module._disable_adapters = active, disabled


class TogetherAttention(_TogetherForward, MultiheadAttention):
    """Attention merges its active adapters for every forward: merging is all that has to know."""


class TogetherExperts(_TogetherForward, ParamWrapper):
    """Expert parameters, with one batched product for the knowledge and the trained adapter where PEFT has one."""

    def get_delta_factors(self, adapter_name: str) -> tuple[Tensor, Tensor, float]:
        lhs, rhs, scaling = super().get_delta_factors(adapter_name)
        if self._together([adapter_name]) == [adapter_name]:
            return lhs, rhs, scaling
        lhs_k, rhs_k, scaling_k = super().get_delta_factors(self.ella_knowledge)
        return torch.cat((scaling_k * lhs_k, scaling * lhs), -1), torch.cat((rhs_k, rhs), -2), 1.0

    def _activate_lora(self, active_adapters: list[str]) -> Any:
        # PEFT reads factors where one adapter is active on several experts, and sums dense updates elsewhere.
        by_factors = len([name for name in active_adapters if name in self.lora_A]) == 1 and self.num_experts > 1
        if not by_factors or self.get_param().dtype.itemsize < 2:
            active_adapters = self._together(list(active_adapters))
        return super()._activate_lora(active_adapters)


# PEFT knows its wrappers by the name of their class when it adds another adapter.
TogetherAttention.__name__, TogetherExperts.__name__ = MultiheadAttention.__name__, ParamWrapper.__name__
_SUBCLASSES: dict[type, type] = {MultiheadAttention: TogetherAttention, ParamWrapper: TogetherExperts}


def act_together(
    module: LoraLayer,
    knowledge: str,
    *,
    in_base: bool,
    forwarded: bool,
    folded: bool,
    merged_by_twin: bool = False,
    unmergeable: str | None = None,
) -> None:
    """Make the trained adapter of ``module`` bring the knowledge along; calling it again changes nothing.

    Args:
        in_base: the knowledge is in the base weight.
        forwarded: whether the layer's own forward runs (an attention's output projection is read as a weight).
        folded: whether the knowledge is of other tasks than the trained adapter; a layer that is trained on through
            all tasks has a copy there, which acts with the adapters disabled only.
        merged_by_twin, unmergeable: see :class:`TogetherVariant`.
    """
    release(module)
    module.ella_knowledge = knowledge
    frozen = {**module.frozen_peft_weight_names, knowledge: tuple(module.adapter_layer_names)}
    module.frozen_peft_weight_names = frozen
    subclass = _SUBCLASSES.get(type(module))
    if subclass is not None:
        module.__class__ = subclass
        return
    if not forwarded:
        module.__class__ = _merging_subclass(type(module))
        return
    if in_base:
        module.lora_variant[knowledge] = TogetherVariant(knowledge, in_base=True)
        return
    by_variant = _names_variants(type(module).forward)
    module.register_forward_hook(PreviousModel(knowledge, always=folded and not by_variant), with_kwargs=True)
    if not folded:
        return
    if by_variant:
        for name in (knowledge, TASK):
            module.lora_variant[name] = TogetherVariant(knowledge, False, merged_by_twin, unmergeable)
    if not _names_variants(type(module).merge):
        module.__class__ = _merging_subclass(type(module))


# By the class of PEFT.
_MADE: dict[type, Any] = {}


def _merging_subclass(cls: type) -> Any:
    if cls not in _MADE:
        _MADE[cls] = type(cls.__name__, (_Made, cls), {"__module__": __name__})
    return _MADE[cls]


class _Made(_Together):
    """Of a class that is no attribute of this module, which is where pickle looks for one."""

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        kept: Any = super().__reduce_ex__(protocol)
        return (_unpickled, (_plain(type(self)),), *kept[2:])


def _plain(cls: type) -> Any:
    """PEFT's class of one made here."""
    return next(c for c in cls.__mro__[1:] if not issubclass(c, _Together))


def _unpickled(plain: Any) -> Any:
    made = _merging_subclass(plain)
    return made.__new__(made)


def _names_variants(method: Any) -> bool:
    """Whether the code of a PEFT layer's method asks for variants."""
    return "lora_variant" in method.__code__.co_names


def release(module: nn.Module) -> None:
    """Take everything of :func:`act_together` off a module; its adapters stay."""
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, (PreviousModel, PreviousModule)):
            del module._forward_hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)
    if not isinstance(module, LoraLayer):
        return
    for name in [name for name, v in module.lora_variant.items() if isinstance(v, TogetherVariant)]:
        del module.lora_variant[name]
    if isinstance(module, _Together):
        module.__class__ = _plain(type(module))
    known = module.__dict__.pop("ella_knowledge", None)
    frozen = module.frozen_peft_weight_names
    module.frozen_peft_weight_names = {name: held for name, held in frozen.items() if name != known}
