"""The router: which backend runs, who is told, and that torch sees one ordinary operator."""

import contextlib
import itertools
import logging
import sys
import threading

import pytest
import torch

from kernelgraft_core.quant.w4a16 import W4A16Weight, dequantize_w4a16, w4a16_linear
from kernelgraft_core.runtime import op as router
from kernelgraft_core.runtime.errors import NoBackendError
from kernelgraft_core.runtime.op import Implementation, Op, deferred, registered_ops
from kernelgraft_core.runtime.testing import assert_close

_names = (f"router_test_{i}" for i in itertools.count())


@pytest.fixture
def make_op():
    """Throw-away ops under names of their own; torch keeps the schema, our table forgets it."""
    made = []

    def make(arguments="Tensor x, float s", fake=lambda x, *_: torch.empty_like(x), **options):
        made.append(Op(f"{next(_names)}({arguments}) -> Tensor", fake, **options))
        return made[-1]

    yield make
    for op in made:
        del router._ops[op.name]


@pytest.fixture
def scale(make_op):
    """``x * s`` with a reference and, above it, a backend for float32 alone."""
    op = make_op()
    op.register(Implementation("reference", lambda x, s: x * s, ("cpu", "cuda")))
    op.register(
        Implementation(
            "fast",
            lambda x, s: x * s + 0,
            ("cpu",),
            10,
            lambda x, s: None if x.dtype == torch.float32 else "float32 only",
        )
    )
    return op


@pytest.fixture
def square(make_op):
    """``x * x`` whose gradient is an op with backends of its own."""
    backward = make_op("Tensor grad, Tensor x")
    backward.register(Implementation("reference", lambda grad, x: 2 * x * grad, ("cpu",)))
    forward = make_op(
        "Tensor x",
        gradient=(
            lambda ctx, grad: backward(grad, *ctx.saved_tensors),
            lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
        ),
    )
    forward.register(Implementation("reference", lambda x: x * x, ("cpu",)))
    return forward, backward


def test_the_highest_priority_that_supports_the_call_runs(scale):
    assert scale.explain("cpu", torch.ones(1), 2.0) == {"fast": "runs", "reference": "ready"}
    assert scale.explain("cpu", torch.ones(1).double(), 2.0) == {"fast": "float32 only", "reference": "runs"}
    assert scale.backends("cpu") == ("fast", "reference")
    assert scale.backends("cuda") == ("reference",)
    assert scale(torch.ones(1).double(), 3.0).item() == 3


def test_a_backend_added_and_taken_out_again(scale):
    undo = scale.register(Implementation("mine", lambda x, s: x * 0 - 1, ("cpu",), 99))
    assert scale(torch.ones(1), 2.0).item() == -1
    undo()
    undo()
    assert scale(torch.ones(1), 2.0).item() == 2
    assert repr(scale) == f"<Op kernelgraft::{scale.name}: fast, reference>"


def test_two_backends_of_one_name_on_one_device_are_refused(scale):
    with pytest.raises(ValueError, match=r"has a backend 'fast' on .*cpu"):
        scale.register(Implementation("fast", lambda x, s: x, ("cpu", "cuda")))
    scale.register(Implementation("fast", lambda x, s: x, ("cuda",)))()


def test_the_environment_forces_one_backend(scale, monkeypatch):
    monkeypatch.setenv("KERNELGRAFT_BACKEND", "fast")
    assert scale.explain("cpu", torch.ones(1), 2.0) == {"fast": "runs", "reference": "KERNELGRAFT_BACKEND is fast"}
    with pytest.raises(NoBackendError, match="fast: float32 only; reference: KERNELGRAFT_BACKEND is fast"):
        scale(torch.ones(1).double(), 2.0)
    monkeypatch.setenv("KERNELGRAFT_BACKEND", "reference")
    assert scale.explain("cpu", torch.ones(1), 2.0)["reference"] == "runs"
    monkeypatch.setenv("KERNELGRAFT_BACKEND", "")
    assert scale.explain("cpu", torch.ones(1), 2.0)["fast"] == "runs"


def test_without_any_backend_the_error_says_so(make_op):
    op = make_op()
    with pytest.raises(NoBackendError, match=f"{op.name} cannot run on cpu: none registered"):
        op(torch.ones(1), 2.0)


def test_what_runs_is_told_once_and_why_others_do_not(scale, caplog):
    caplog.set_level(logging.INFO, logger="kernelgraft")
    for _ in range(3):
        scale(torch.ones(1).double(), 2.0)
        scale(torch.ones(1), 2.0)
    assert [(r.levelname, r.getMessage()) for r in caplog.records] == [
        ("WARNING", f"{scale.name}: backend fast passed over: float32 only"),
        ("INFO", f"{scale.name}: backend reference runs on cpu"),
        ("INFO", f"{scale.name}: backend fast runs on cpu"),
    ]


def test_reasons_that_never_repeat_do_not_flood_the_log(scale, caplog):
    count = itertools.count()
    undo = scale.register(Implementation("picky", lambda x, s: x, ("cpu",), 99, lambda x, s: f"reason {next(count)}"))
    for _ in range(100):
        scale(torch.ones(1), 2.0)
    undo()
    assert len(caplog.records) <= router._REASONS_LOGGED


def test_backends_may_come_and_go_while_other_threads_call(scale):
    wrong, stop = [], threading.Event()

    def call():
        while not stop.is_set():
            value = scale(torch.ones(1), 2.0).item()
            if value not in (2, -1):
                wrong.append(value)

    callers = [threading.Thread(target=call) for _ in range(3)]
    for caller in callers:
        caller.start()
    for _ in range(200):
        scale.register(Implementation("mine", lambda x, s: x * 0 - 1, ("cpu",), 99))()
    stop.set()
    for caller in callers:
        caller.join()
    assert not wrong
    assert scale(torch.ones(1), 2.0).item() == 2


def test_the_gradient_has_backends_of_its_own(square):
    forward, backward = square
    x = torch.tensor([3.0], requires_grad=True)
    forward(x).sum().backward()
    assert x.grad.item() == 6
    undo = backward.register(Implementation("mine", lambda grad, x: torch.full_like(x, 42), ("cpu",), 10))
    (grad,) = torch.autograd.grad(forward(x).sum(), x)
    undo()
    assert grad.item() == 42


def test_gradients_agree_with_finite_differences(square):
    forward, _ = square
    assert torch.autograd.gradcheck(forward, (torch.randn(4, dtype=torch.float64, requires_grad=True),))


def test_functorch_is_refused_rather_than_given_a_zero_gradient(square):
    forward, _ = square
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: forward(x).sum())(torch.ones(3))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_grad_mode_gives_the_same_numbers(square, mode):
    forward, _ = square
    x = torch.tensor([3.0], requires_grad=True)
    with mode():
        out = forward(x)
    assert out.item() == 9
    assert out.requires_grad == (mode is torch.enable_grad)
    assert not forward(x.detach()).requires_grad


def test_without_a_formula_a_gradient_is_refused_rather_than_wrong(scale):
    x = torch.ones(2, requires_grad=True)
    out = scale(x, 2.0)
    with pytest.raises(NotImplementedError, match=f"{scale.name} has no gradient"):
        out.sum().backward()


def test_opcheck_and_compile_see_an_ordinary_operator(square, scale):
    forward, _ = square
    torch.library.opcheck(scale._overload, (torch.randn(3, 4), 2.0))
    torch.library.opcheck(forward._overload, (torch.randn(3, 4, requires_grad=True),))

    def function(x):
        return forward(scale(x.detach(), 2.0) + x)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 5):
        x = torch.randn(rows, 4, requires_grad=True)
        torch.testing.assert_close(compiled(x), function(x))
        torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), x), torch.autograd.grad(function(x).sum(), x))


@pytest.mark.parametrize("arguments", ["Tensor x, float s=2.0", "Tensor x, *, float s"])
def test_schemas_torch_would_rewrite_are_refused(make_op, arguments):
    with pytest.raises(ValueError, match=r"\['s'\] have defaults or are keyword-only"):
        make_op(arguments)


class TestAutocast:
    @pytest.fixture
    def linear(self, make_op):
        op = make_op(
            "Tensor x, Tensor scales, Tensor? bias",
            fake=lambda x, scales, bias: torch.empty_like(x),
            gradient=(
                lambda ctx, grad: (grad * 2, None, grad.clone() if ctx.needs_input_grad[2] else None),
                lambda ctx, inputs, output: None,
            ),
            autocast=("x", "bias"),
        )

        def run(x, scales, bias):
            assert scales.dtype == torch.float16  # part of the weight: not autocast's to change
            assert bias is None or bias.dtype == x.dtype
            return x * 2 if bias is None else x * 2 + bias

        op.register(Implementation("reference", run, ("cpu",)))
        return op

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_named_arguments_run_in_autocasts_dtype_as_in_linear(self, linear, dtype):
        x, scales, bias = torch.randn(3), torch.ones(3, dtype=torch.float16), torch.randn(3)
        with torch.autocast("cpu", dtype):
            assert linear(x, scales, bias).dtype == dtype
            assert linear(x, scales, None).dtype == dtype
            assert torch.nn.functional.linear(x, torch.eye(3)).dtype == dtype
            assert linear(x.double(), scales, None).dtype == torch.float64
            with torch.autocast("cpu", enabled=False):
                assert linear(x, scales, bias).dtype == torch.float32
        assert linear(x, scales, bias).dtype == torch.float32

    def test_gradients_come_back_in_the_callers_dtype(self, linear):
        x = torch.randn(3, requires_grad=True)
        bias = torch.zeros(3, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            out = linear(x, torch.ones(3, dtype=torch.float16), bias)
        out.float().sum().backward()
        assert x.grad.dtype == torch.float32
        torch.testing.assert_close(x.grad, torch.full((3,), 2.0))
        torch.testing.assert_close(bias.grad, torch.ones(3))

    def test_compiled_code_does_the_same(self, linear):
        def function(x, scales):
            with torch.autocast("cpu", torch.bfloat16):
                return linear(x, scales, None)

        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
        args = (torch.randn(3), torch.ones(3, dtype=torch.float16))
        assert compiled(*args).dtype == torch.bfloat16
        torch.testing.assert_close(compiled(*args), function(*args))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_w4a16_linear_follows_the_linear_layer_it_replaces(self, dtype):
        weight = W4A16Weight.from_integers(
            torch.randint(0, 16, (8, 32)), torch.rand(8, 1), torch.full((8, 1), 8, dtype=torch.uint8)
        )
        packed = (weight.qweight, weight.scales, weight.zeros)
        dense = dequantize_w4a16(*packed, torch.float32)
        x, bias = torch.randn(5, 32, requires_grad=True), torch.randn(8).to(dtype).requires_grad_()
        results = []
        for linear in (lambda: w4a16_linear(x, *packed, bias), lambda: torch.nn.functional.linear(x, dense, bias)):
            with torch.autocast("cpu", dtype):
                out = linear()
            results.append((out, *torch.autograd.grad(out.float().square().sum(), (x, bias))))
        for name, ours, theirs in zip(("out", "grad_x", "grad_bias"), *results, strict=True):
            assert ours.dtype == theirs.dtype
            assert_close(name, theirs, ours, 0.02)

    def test_without_a_rule_arguments_stay_as_they_are(self, scale):
        with torch.autocast("cpu", torch.bfloat16):
            assert scale(torch.ones(2), 2.0).dtype == torch.float32

    def test_a_name_that_is_no_argument_is_refused(self, make_op):
        with pytest.raises(ValueError, match=r"autocast names \['y'\], its arguments are \('x', 's'\)"):
            make_op(autocast=("x", "y"))


@pytest.fixture
def dtensor(tmp_path):
    if not torch.distributed.is_available():
        pytest.skip("torch was built without distributed")
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield distribute_tensor(torch.ones(4), init_device_mesh("cpu", (1,)))
    torch.distributed.destroy_process_group()


def test_a_distributed_tensor_is_refused_by_name(scale, dtensor):
    with pytest.raises(TypeError, match=rf"{scale.name} takes no DTensor \(x\): pass its .to_local\(\)"):
        scale(dtensor, 2.0)
    assert scale(dtensor.to_local(), 2.0)[0].item() == 2


def test_a_deferred_function_is_imported_at_its_first_call(tmp_path, monkeypatch):
    (tmp_path / "kernels_of_a_test.py").write_text("def double(x):\n    return 2 * x\n")
    monkeypatch.syspath_prepend(tmp_path)
    double = deferred("kernels_of_a_test", "double")
    assert "kernels_of_a_test" not in sys.modules
    assert double(4) == 8
    assert sys.modules.pop("kernels_of_a_test")
    assert double(5) == 10


@pytest.mark.parametrize("grad", [False, True])
def test_a_result_that_is_a_view_of_a_kernels_buffer_can_be_written_to(make_op, grad):
    op = make_op("Tensor x", lambda x: torch.empty_like(x), gradient=(lambda ctx, g: g, None))
    op.register(Implementation("buffer", lambda x: torch.cat((x, x))[: len(x)], ("cpu",)))
    x, bias = torch.ones(3, requires_grad=grad), torch.ones(3, requires_grad=True)
    with torch.no_grad() if not grad else contextlib.nullcontext():
        out = op(x)
    out += bias
    out.sum().backward()
    assert torch.equal(bias.grad, torch.ones(3))
    assert torch.equal(out, torch.full((3,), 2.0))


def test_every_op_is_listed_by_name(scale):
    assert registered_ops()[scale.name] is scale


def test_a_forward_mode_gradient_is_refused_rather_than_dropped():
    from torch.autograd import forward_ad

    from kernelgraft_core.quant.w4a16 import w4a16_linear
    from kernelgraft_core.quant.w4a16.examples import example_args

    x, *weight = example_args("cpu")["w4a16_linear"]
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match=r"w4a16_linear has no forward-mode gradient \(x\)"):
            w4a16_linear(dual, *weight)


def test_an_op_that_writes_to_an_argument_is_one_and_has_no_gradient():
    with pytest.raises(ValueError, match=r"writes to \['x'\]: it cannot have a gradient"):
        Op(f"{next(_names)}(Tensor(a!) x) -> ()", fake=lambda x: None, gradient=(lambda ctx: None, lambda *_: None))
    op = Op(f"{next(_names)}(Tensor x, Tensor(a!) y) -> ()", fake=lambda *_: None)
    op.register(Implementation("reference", lambda x, y: y.add_(x) and None, ("cpu",)))
    assert op.mutates == (1,)
    x, y = torch.ones(1, requires_grad=True), torch.zeros(1)
    op(x, y)
    assert y.item() == 1
    compiled = torch.compile(lambda x, y: op(x, y), fullgraph=True, backend="aot_eager")
    compiled(torch.ones(1), y)
    assert y.item() == 2
    del router._ops[op.name]
