"""Every way to differentiate a penalty gives the derivative or refuses by name; none gives zero or None in silence."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import ella_kernels as ek
from tests.kernels.cases import BOUND, exact, factors, relative_error

A, B, PAST = factors(30, 40, 4, 5, energy=True)
OPTIONS = [
    {"algorithm": algorithm, "backend": backend}
    for algorithm in ("gram", "stream", "dense")
    for backend in ("torch", "triton")
]
OPTIONS += [{"backend": backend} for backend in ("torch", "triton")]
every = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o.values()))


def penalty_of(options, past=PAST):
    function = ek.hadamard_penalty if "algorithm" in options else ek.spectral_penalty
    return lambda a, b: function(a, b, past, 0.7, **options)


def wanted(options):
    return exact(A, B, PAST, 0.7, "hadamard" if "algorithm" in options else "spectral")


def check(found, want):
    for got, exact_one in zip(found, want, strict=True):
        assert relative_error(got, exact_one) < BOUND[torch.float32]


@every
def test_torch_func(options):
    penalty, want = penalty_of(options), wanted(options)
    check(torch.func.grad(penalty, argnums=(0, 1))(A, B), want[1:])
    grad_b, value = torch.func.grad_and_value(lambda b: penalty(A, b))(B)
    check((value, grad_b), (want[0], want[2]))
    value, pullback = torch.func.vjp(penalty, A, B)
    check((value, *pullback(torch.tensor(2.0))), (want[0], 2 * want[1], 2 * want[2]))
    check(torch.func.jacrev(penalty, argnums=(0, 1))(A, B), want[1:])


def test_torch_func_of_a_group_and_half_factors():
    def loss(As, Bs):
        values = ek.hadamard_penalty_grouped(As, Bs, [PAST, None], [0.7, 1.0])
        return (values * torch.tensor([3.0, 1.0])).sum()

    _, want_a, want_b = exact(A.bfloat16(), B, PAST, 0.7)
    grads_A, grads_B = torch.func.grad(loss, argnums=(0, 1))([A.bfloat16(), A], [B, B])
    assert grads_A[0].dtype == torch.bfloat16 and relative_error(grads_A[0], 3 * want_a) < 8e-3
    check([grads_B[0]], [3 * want_b])
    assert not grads_A[1].any() and not grads_B[1].any()


def second(*, of, into):
    """The gradient in one factor, differentiated in another one."""
    a, b = A.clone().requires_grad_(), B.clone().requires_grad_()
    factors = {"a": a, "b": b}

    def differentiate(penalty):
        (grad,) = torch.autograd.grad(penalty(a, b), factors[of], create_graph=True)
        return torch.autograd.grad(grad.sum(), factors[into], allow_unused=True)

    return differentiate


def dual_numbers(penalty):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(penalty(forward_ad.make_dual(A, torch.ones_like(A)), B)).tangent


def dual_parameter(penalty):
    with forward_ad.dual_level():
        a = forward_ad.make_dual(A.clone().requires_grad_(), torch.ones_like(A))
        (grad,) = torch.autograd.grad(penalty(a, B), a, create_graph=True)
        return forward_ad.unpack_dual(grad).tangent


def jvp(function, at):
    return torch.func.jvp(function, (at,), (torch.ones_like(at),))[1]


def directions():
    gen = torch.Generator().manual_seed(1)
    return torch.randn(A.shape, generator=gen), torch.randn(B.shape, generator=gen)


@every
def test_forward_mode(options):
    penalty, (value, grad_a, grad_b), (along_a, along_b) = penalty_of(options), wanted(options), directions()
    slopes = (grad_a * along_a).sum(), (grad_b * along_b).sum()
    with forward_ad.dual_level():
        for a, b, slope in (
            (forward_ad.make_dual(A, along_a), B, slopes[0]),
            (A, forward_ad.make_dual(B.clone().requires_grad_(), along_b), slopes[1]),
            (forward_ad.make_dual(A, along_a), forward_ad.make_dual(B, along_b), slopes[0] + slopes[1]),
        ):
            check(forward_ad.unpack_dual(penalty(a, b)), (value, slope))
    check(torch.func.jvp(penalty, (A, B), (along_a, along_b)), (value, slopes[0] + slopes[1]))
    value_of_b, linear = torch.func.linearize(lambda b: penalty(A, b), B)
    check((value_of_b, linear(along_b), linear(2 * along_b)), (value, slopes[1], 2 * slopes[1]))
    check(torch.func.jacfwd(penalty, argnums=(0, 1))(A, B), (grad_a, grad_b))


def test_forward_mode_of_a_group():
    along_a, _ = directions()
    values, slopes = torch.func.jvp(
        lambda a: ek.hadamard_penalty_grouped([A, a, a], [B, B, B], [PAST, PAST, None], [0.7, 0.7, 1.0]),
        (A,),
        (along_a,),
    )
    value, grad_a, _ = exact(A, B, PAST, 0.7)
    check((values[1], slopes[1]), (value, (grad_a * along_a).sum()))
    assert values.dtype == slopes.dtype == torch.float32 and not slopes[0] and not slopes[2]


def test_gradcheck_forwards():
    a, b, past = factors(7, 6, 2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda a, b: ek.spectral_penalty(a, b, past, 0.7),
        (a.requires_grad_(), b.requires_grad_()),
        check_forward_ad=True,
    )


def test_backward_of_what_had_a_tangent():
    """Once the level is closed there is no second derivative to be missed."""
    b = B.clone().requires_grad_()
    with forward_ad.dual_level():
        value = ek.hadamard_penalty(forward_ad.make_dual(A, torch.ones_like(A)), b, PAST)
    check(torch.autograd.grad(value, b), exact(A, B, PAST, 1.0)[2:])


SECOND = "ella_kernels: second-order derivatives"
REFUSED = {
    "of a in a": second(of="a", into="a"),
    "of a in b": second(of="a", into="b"),
    "of b in a": second(of="b", into="a"),
    "autograd.functional.hessian": lambda f: torch.autograd.functional.hessian(lambda a: f(a, B), A),
    "grad of grad": lambda f: torch.func.grad(lambda a: torch.func.grad(f)(a, B).sum())(A),
    "grad of grad, mixed": lambda f: torch.func.grad(lambda b: torch.func.grad(f)(A, b).sum())(B),
    "dual numbers over backward": dual_parameter,
    "jvp of grad": lambda f: jvp(lambda a: torch.func.grad(f)(a, B), A),
    "jvp of grad, mixed": lambda f: jvp(lambda b: torch.func.grad(f)(A, b), B),
    "grad of jvp": lambda f: torch.func.grad(lambda b: jvp(lambda a: f(a, b), A))(B),
    "jvp of jvp": lambda f: jvp(lambda b: jvp(lambda a: f(a, b), A), B),
    "hessian": lambda f: torch.func.hessian(f)(A, B),
}


@pytest.mark.parametrize("differentiate", REFUSED.values(), ids=REFUSED)
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3], OPTIONS[6]], ids=lambda o: "-".join(o.values()))
def test_second_derivatives_are_refused_by_name(options, differentiate):
    with pytest.raises(RuntimeError, match=SECOND):
        differentiate(penalty_of(options))


def test_vmap_is_refused_by_name():
    with pytest.raises(RuntimeError, match="ella_kernels: a penalty cannot be vmapped"):
        torch.func.vmap(lambda a: ek.hadamard_penalty(a, B, PAST))(torch.stack([A, A]))


@pytest.mark.parametrize("field", PAST._fields)
def test_a_tangent_of_the_past_is_refused(field):
    with pytest.raises(ValueError, match="ella_kernels: past must not have a tangent"):
        jvp(lambda t: penalty_of({}, PAST._replace(**{field: t}))(A, B), getattr(PAST, field))


def test_a_compiled_jvp_is_refused():
    @torch.compile(fullgraph=True, backend="aot_eager")
    def tangent(a):
        return jvp(lambda a: ek.hadamard_penalty(a, B, PAST), a)

    with pytest.raises(Exception, match="ella_kernels: forward-mode derivatives of a penalty are not compiled"):
        tangent(A)


def test_constants_inside_a_transform_are_constants():
    def loss(x):
        return x.square().sum() + ek.hadamard_penalty(A, B, PAST)

    x = torch.randn(3)
    value, tangent = torch.func.jvp(loss, (x,), (torch.ones(3),))
    assert torch.allclose(tangent, 2 * x.sum())
    check([value - x.square().sum()], exact(A, B, PAST, 1.0)[:1])
    assert torch.allclose(torch.func.grad(loss)(x), 2 * x)


def test_a_gradient_is_linear_in_what_multiplies_the_value():
    a, ella_lambda = A.clone().requires_grad_(), torch.tensor(2.0, requires_grad=True)
    (grad,) = torch.autograd.grad(ella_lambda * ek.hadamard_penalty(a, B, PAST), a, create_graph=True)
    (found,) = torch.autograd.grad(grad.sum(), ella_lambda)
    check([found], [exact(A, B, PAST, 1.0)[1].sum()])


def test_recomputed_in_backward():
    a = A.clone().requires_grad_()
    checkpoint(lambda a: ek.hadamard_penalty(a, B, PAST), a, use_reentrant=False).backward()
    check([a.grad], exact(A, B, PAST, 1.0)[1:2])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_in_place_form_refuses_to_be_differentiated(backend):
    grads = torch.zeros_like(A), torch.zeros_like(B)

    def add(a, weight=1.0):
        return ek.add_hadamard_grad_([a], [B], [PAST], [1.0], [grads[0]], [grads[1]], weight=weight, backend=backend)[0]

    message = "ella_kernels: gradients added in place cannot be differentiated"
    add(A, 0.0)
    for differentiate in (torch.func.grad(add), lambda a: jvp(add, a), lambda a: dual_numbers(lambda a, _: add(a))):
        with pytest.raises(RuntimeError, match=message):
            differentiate(A)
    with pytest.raises(RuntimeError, match=message):
        jvp(lambda weight: add(A, weight), torch.tensor(2.0))
    assert not grads[0].any() and not grads[1].any()
    # Without what is differentiated in it, it is what it always is.
    torch.func.grad(lambda x: (add(A), x.square().sum())[1])(torch.ones(2))
    check(grads, exact(A, B, PAST, 1.0)[1:])
