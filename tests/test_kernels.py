"""prepare.py's kernels and attention: against plain mathematics in float64, and that whatever they do not cover goes to
plain torch. What needs a GPU is marked; Triton's interpreter shows the same kernels on the CPU."""

import functools
import math
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, explicit_attention
from torch import nn
from torch.utils.checkpoint import checkpoint

import prepare

on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
on_hopper = pytest.mark.skipif(not prepare.has_kernels(torch.device("cuda")), reason="no Hopper GPU here")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def bf16(*shape, seed=0, scale=1.0):
    """Numbers that bf16 holds exactly, as a float32 leaf."""
    random = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(shape, generator=random)).bfloat16().float().to(DEVICE).requires_grad_()


def relative_errors(function, plain, *leaves):
    """Errors of the output and of every leaf's gradient against float64, for random output gradients."""
    copies = [leaf.detach().double().requires_grad_() for leaf in leaves]
    out, expected = function(*leaves), plain(*copies)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE).bfloat16()
    out.backward(weights.to(out.dtype))
    expected.backward(weights.double())
    pairs = [(out, expected), *((leaf.grad, copy.grad) for leaf, copy in zip(leaves, copies, strict=True))]
    return [((a.double() - b).norm() / b.norm().clamp_min(1e-3)).item() for a, b in pairs]


def are_small(errors) -> bool:
    return all(error < 1e-2 for error in errors)  # as max() would not, this sees a NaN


def linear(rows, cols, seed, **options):
    module = nn.Linear(cols, rows, bias=False, **options).to(DEVICE)
    module.weight = nn.Parameter(bf16(rows, cols, seed=seed, scale=0.1).detach())
    return module


# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


def rotary_tables(T, D):
    angles = torch.outer(torch.arange(T), 10_000.0 ** (-torch.arange(0, D, 2) / D))[:, None].to(DEVICE)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    return torch.cat((cos, cos), -1), torch.cat((sin, -sin), -1)


def plain_turn(x, cos, sin):
    """RMS norm, then the rotation of (x1, x2) by the table's angle, in x's precision."""
    x = x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()
    (x1, x2), c, s = x.chunk(2, -1), cos.chunk(2, -1)[0].to(x.dtype), sin.chunk(2, -1)[0].to(x.dtype)
    return torch.cat((x1 * c + x2 * s, x2 * c - x1 * s), -1)


def plain_attention(q, k, v, tables, window):
    if tables:
        q, k = plain_turn(q, *tables), plain_turn(k, *tables)
    return explicit_attention(q, k, v, window)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("is_turned", [True, False])
@pytest.mark.parametrize(("H", "KV", "D"), [(4, 4, 128), (4, 2, 128), (3, 1, 64)])
@pytest.mark.parametrize(
    ("T", "window"), [(256, 128), (256, 100), (320, 1), (192, 0), (128, 64), (128, 127), (64, 9999)]
)
def test_the_window_kernel_is_plain_attention(H, KV, D, T, window, is_turned):
    leaves = [bf16(2, T, heads, D, seed=i) for i, heads in enumerate((H, KV, KV))]
    tables = rotary_tables(T, D) if is_turned else ()
    prepare.kernels_used.clear()
    errors = relative_errors(
        lambda *qkv: prepare.window_attention(*qkv, *tables, window=window),
        lambda *qkv: plain_attention(*qkv, tables, window),
        *leaves,
    )
    # With a window of 0 only the value counts, and the other two gradients are 0.
    assert are_small((errors[0], errors[3], *(errors[1:3] if window else [])))
    assert prepare.kernels_used == {"window attention"}


@pytest.mark.gpu
@on_hopper
def test_the_window_kernel_takes_queries_keys_and_values_as_they_lie_in_memory():
    B, T, H, D = 2, 128, 2, 64
    wide = bf16(B, T, 3 * H * D + 1).detach().bfloat16()  # no slice of it is aligned
    parts = [wide[..., i * H * D + 1 : (i + 1) * H * D + 1].view(B, T, H, D) for i in range(3)]
    for q, k, v in (parts, [t.transpose(1, 2).contiguous().transpose(1, 2) for t in parts]):
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        function = functools.partial(prepare.window_attention, window=50)
        assert are_small(relative_errors(function, lambda *qkv: plain_attention(*qkv, (), 50), *leaves))


def attention_of(window):
    if window is None:
        return functools.partial(prepare.plain_attention, is_causal=True)
    return functools.partial(prepare.window_attention, window=window)


def attend_projected(x, more_v, linears, tables, window):
    v, attend = prepare.project(attention_of(window), x, *linears, more_v.size(3), *tables)
    return attend(v + more_v.to(v.dtype))


def plain_projected(x, more_v, *weights, tables, window):
    q, k, v = (F.linear(x, w).unflatten(2, (-1, more_v.size(3))) for w in weights)
    return plain_attention(q, k, v + more_v, tables, 9999 if window is None else window)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(("H", "KV", "D", "width"), [(4, 4, 128, 512), (4, 2, 128, 512), (3, 1, 128, 72)])
@pytest.mark.parametrize(
    ("B", "T", "window"),
    [(2, 256, 100), (1, 64, 9999), (40, 512, 256), (8, 2048, 1024), (3, 256, None), (1, 192, None)],
)
def test_queries_keys_and_values_of_one_product_are_plain_mathematics(H, KV, D, width, B, T, window):
    x, more_v, tables = bf16(B, T, width), bf16(B, T, KV, D, seed=1), rotary_tables(T, D)
    linears = [linear(heads * D, width, 2 + i) for i, heads in enumerate((H, KV, KV))]
    errors = relative_errors(
        lambda x, more_v, *_: attend_projected(x.bfloat16(), more_v, linears, tables, window),
        functools.partial(plain_projected, tables=tables, window=window),
        *(x, more_v, *(layer.weight for layer in linears)),
    )
    assert are_small(errors)


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("B", [1, 3, 40])
def test_the_products_of_queries_and_keys_are_turned_and_that_of_values_is_not(B):
    x, weight, (cos, sin) = bf16(B * 256, 64).bfloat16(), bf16(512, 64, seed=1).bfloat16(), rotary_tables(256, 128)
    q, k, v, factors = prepare._turned_products(x, weight, cos, sin, 256, 128)
    product = (x @ weight.T).view(B, 256, 4, 128)
    expected = prepare.turn(product[:, :, :3].float(), cos, sin).bfloat16()
    assert torch.allclose(torch.cat((q, k), 1).view(expected.shape), expected, atol=0.02)
    assert torch.equal(v, x @ weight[384:].T)
    rms = product[:, :, :3].float().square().mean(-1).sqrt().view(-1, 3)
    assert torch.allclose(factors, 1 / rms, rtol=1e-4)


@pytest.mark.parametrize("are_adjacent", [True, False])
def test_gradients_of_a_product_in_parts_are_those_of_the_whole(are_adjacent):
    x, weight, whole = (torch.randn(shape, device=DEVICE) for shape in ((50, 8), (12, 8), (50, 12)))
    parts = whole.split([4, 6, 2], dim=1)
    dx, dw = prepare._product_gradients([*(parts if are_adjacent else map(torch.clone, parts))], x, weight)
    assert torch.allclose(dx, whole @ weight, atol=1e-4)
    assert torch.allclose(dw, whole.T @ x, atol=1e-4)


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_a_gradient_is_led_back_through_norm_and_rotation(is_checkpointed):
    x, (cos, sin), weights = bf16(2, 64, 3, 32), rotary_tables(64, 32), bf16(2, 64, 3, 32, seed=1).detach()
    factors = torch.rsqrt(x.detach().square().mean(-1) + torch.finfo(torch.float32).eps)
    call = functools.partial(checkpoint, use_reentrant=False) if is_checkpointed else lambda f, *inputs: f(*inputs)
    y = prepare.turn(x.detach(), cos, sin).requires_grad_()
    call(prepare._Turned.apply, y, factors, cos, sin).backward(weights)
    copy = x.detach().double().requires_grad_()
    plain_turn(copy, cos, sin).backward(weights.double())
    assert torch.allclose(y.grad.double(), copy.grad, atol=0.02)


@pytest.fixture
def with_kernels(monkeypatch):
    """As on a Hopper GPU, but whoever calls a kernel's operator is caught."""
    monkeypatch.setattr(prepare, "has_kernels", lambda device: True)
    monkeypatch.setattr(prepare, "_is_bf16_on_gpu", lambda x: True)
    for name in ("_window_attention", "_turned_products", "_relu2_mlp", "_head_loss"):
        monkeypatch.setattr(prepare, name, lambda *inputs, name=name: pytest.fail(f"{name} was called"))


@pytest.mark.parametrize(
    ("q_shape", "k_shape", "v_shape"),
    [
        ((1, 100, 2, 64), (1, 100, 2, 64), (1, 100, 2, 64)),
        ((1, 64, 2, 96), (1, 64, 2, 96), (1, 64, 2, 96)),
        ((1, 64, 2, 64), (1, 64, 2, 64), (1, 64, 2, 32)),
        ((0, 64, 2, 64), (0, 64, 2, 64), (0, 64, 2, 64)),
    ],
    ids=["length no multiple of 64", "heads of 96", "narrow values", "no rows"],
)
def test_attention_of_other_shapes_is_plain(with_kernels, q_shape, k_shape, v_shape):
    q, k, v = (torch.randn(shape) for shape in (q_shape, k_shape, v_shape))
    tables = rotary_tables(q_shape[1], q_shape[3])
    for given in ((), tables):
        out = prepare.window_attention(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), *given, window=10)
        expected = plain_attention(*(t.to(DEVICE).double() for t in (q, k, v)), given, 10)
        assert torch.allclose(out.double(), expected, atol=1e-4)


@pytest.mark.parametrize("edit", ["learned", "of another shape"])
def test_attention_with_tables_that_the_kernel_does_not_cover_is_plain(with_kernels, edit):
    q, k, v = (torch.randn(1, 64, 2, 64, device=DEVICE) for _ in range(3))
    tables = [table.float() for table in rotary_tables(64, 64)]
    expected = plain_attention(q.double(), k.double(), v.double(), tables, 10)
    for table in tables:
        table.requires_grad_(edit == "learned")
    if edit == "of another shape":
        tables = [table.expand(1, 64, 2, 64) for table in tables]
    out = prepare.window_attention(q, k, v, *tables, window=10)
    assert torch.allclose(out.double(), expected, atol=1e-4)


@pytest.mark.parametrize(
    "edit",
    [
        *("a bias", "no linear layer", "wide", "heads of 64", "another attention", "short sequences"),
        *("learned tables", "no tables", "tables of a batch"),
    ],
)
def test_projections_that_the_product_does_not_cover_are_plain(with_kernels, monkeypatch, edit):
    monkeypatch.setattr(prepare, "gluon", object())
    width, D = 520 if edit == "wide" else 64, 64 if edit == "heads of 64" else 128
    T = 60 if edit == "short sequences" else 64
    x, tables = torch.randn(1, T, width), rotary_tables(T, D)
    tables = [table.float().cpu().requires_grad_(edit == "learned tables") for table in tables]
    if edit == "no tables":
        tables = [None, None]
    if edit == "tables of a batch":
        tables = [table.expand(1, T, 1, D) for table in tables]
    linears = [nn.Linear(width, 2 * D, bias=edit == "a bias") for _ in range(3)]
    if edit == "no linear layer":
        linears[1] = nn.Sequential(linears[1], nn.Tanh())

    def attend_all(q, k, v, cos, sin):
        tables = [table.view(T, 1, D) for table in (cos, sin) if table is not None]
        return plain_attention(q, k, v, tables, T)

    expected = attend_all(*(layer(x).view(1, T, 2, D) for layer in linears), *tables)
    attend = attend_all if edit == "another attention" else attention_of(None)
    v, attend = prepare.project(attend, x, *linears, D, *tables)
    assert torch.allclose(attend(v).double(), expected.double(), atol=1e-5)


def test_tables_that_do_not_rotate_are_refused():
    cos, sin = rotary_tables(64, 64)
    prepare._check_rotation(cos, sin)
    for bad in ((1.1 * cos, 1.1 * sin), (cos, sin.roll(1, -1)), (cos, sin.abs())):
        with pytest.raises(ValueError, match="no rotation"):
            prepare._check_rotation(*bad)


def test_a_shorter_sequence_than_the_longest_is_attended_to_all_the_same():
    q, k, v = (torch.randn(1, 12, 2, 8) for _ in range(3))
    for window in (5, 16):
        _, attend = prepare.make_attention(window, 16, 8, torch.device("cpu"))
        assert torch.allclose(attend(q, k, v), explicit_attention(q, k, v, window).float(), atol=1e-5)


# ---------------------------------------------------------------------------------------------------------------------
# MLP and projections
# ---------------------------------------------------------------------------------------------------------------------


def plain_mlp(x, w_in, w_out):
    return (x @ w_in.T).relu().square() @ w_out.T


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize(
    ("rows", "width", "hidden", "out"),
    [(512, 128, 512, 128), (300, 72, 200, 72), (1, 8, 8, 8), (64, 64, 128, 32), (20_000, 512, 2048, 512)],
)
@pytest.mark.parametrize("strip_width", [512, 0])
def test_the_mlp_kernels_are_the_plain_mlp(monkeypatch, rows, width, hidden, out, strip_width):
    monkeypatch.setattr(prepare, "MAX_STRIP_WIDTH", strip_width)  # wider rows go to the other kernel
    c_in, c_out = linear(hidden, width, 1), linear(out, hidden, 2)
    prepare.kernels_used.clear()
    errors = relative_errors(
        lambda x, *_: prepare.relu2_mlp(x.bfloat16(), c_in, c_out),
        plain_mlp,
        bf16(rows, width),
        c_in.weight,
        c_out.weight,
    )
    assert are_small(errors)
    assert prepare.kernels_used == {"mlp"}


@pytest.mark.gpu
@on_hopper
@pytest.mark.parametrize("name", ["transposed", "unaligned"])
def test_the_mlp_kernel_takes_its_input_as_it_lies_in_memory(name):
    c_in, c_out = linear(128, 64, 1), linear(64, 128, 2)
    memory = bf16(64, 256).detach().bfloat16()
    x = (memory.T if name == "transposed" else memory[:, 1:65]).detach().requires_grad_()
    plain = functools.partial(plain_mlp, w_in=c_in.weight.double(), w_out=c_out.weight.double())
    assert are_small(relative_errors(lambda x: prepare.relu2_mlp(x, c_in, c_out), plain, x))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def watched(module):
    module.register_forward_hook(lambda module, inputs, output: 2 * output)
    return module


MLP_EDITS = {
    "a bias inside": (lambda: (nn.Linear(8, 16), nn.Linear(16, 8, bias=False)), (4, 8)),
    "a bias outside": (lambda: (nn.Linear(8, 16, bias=False), nn.Linear(16, 8)), (4, 8)),
    "a layer of another kind": (lambda: (Doubled(8, 16, bias=False), nn.Linear(16, 8, bias=False)), (4, 8)),
    "several layers": (lambda: (nn.Sequential(nn.Linear(8, 16)), nn.Linear(16, 8, bias=False)), (4, 8)),
    "weights made by a hook": (lambda: (watched(nn.Linear(8, 16, bias=False)), nn.Linear(16, 8, bias=False)), (4, 8)),
    "a width that is no multiple of 8": (lambda: (nn.Linear(8, 12, bias=False), nn.Linear(12, 8, bias=False)), (4, 8)),
    "no rows": (lambda: (nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)), (0, 8)),
}


@pytest.mark.parametrize("edit", MLP_EDITS)
def test_an_mlp_that_the_kernel_does_not_cover_is_plain(with_kernels, edit):
    layers, shape = MLP_EDITS[edit]
    (c_in, c_out), x = layers(), torch.randn(shape)
    assert torch.equal(prepare.relu2_mlp(x, c_in, c_out), c_out(c_in(x).relu() ** 2))


# ---------------------------------------------------------------------------------------------------------------------
# Loss
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize(
    ("rows", "width", "vocab", "cap"),
    [(64, 128, 8192, 15), (100, 64, 1000, 15), (3, 16, 5, 2), (16, 64, 32768, 40), (8, 64, 100, 1000)],
)
@pytest.mark.parametrize("is_strided", [False, True])
def test_the_loss_kernel_is_plain_cross_entropy(rows, width, vocab, cap, is_strided):
    x, head = bf16(rows, width), linear(vocab, width, 1)
    head.weight = nn.Parameter(bf16(vocab, width, seed=1).detach())
    targets = torch.randint(0, vocab, (rows,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    targets[1] = -1
    given = targets.repeat_interleave(3)[::3] if is_strided else targets
    factors = torch.rand(rows, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    prepare.kernels_used.clear()
    with torch.autocast("cuda", torch.bfloat16):
        losses = prepare.softcap_loss(x.bfloat16(), head, given, float(cap))
    losses.backward(factors)
    assert prepare.kernels_used == ({"loss"} if cap <= 40 else set())
    plain_x, plain_weight = x.detach().double().requires_grad_(), head.weight.detach().double().requires_grad_()
    product = plain_x @ plain_weight.T
    logits = product + (product.detach().bfloat16().double() - product.detach())  # the product's own rounding
    log_p = (cap * torch.tanh(logits / cap)).log_softmax(-1)
    expected = -log_p.gather(1, targets.clamp_min(0).unsqueeze(1)).squeeze(1) * (targets != -1)
    expected.backward(factors.double())
    assert losses[1] == 0
    assert torch.allclose(losses.double(), expected, rtol=1e-4, atol=1e-4)
    for got, wanted in ((x.grad, plain_x.grad), (head.weight.grad, plain_weight.grad)):
        assert (got.double() - wanted).norm() < 1e-2 * wanted.norm()


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("target", [-100, -2, 8, 10**9])
def test_a_target_that_is_no_token_has_no_number_for_a_loss(target):
    losses = prepare.softcap_loss(
        bf16(3, 16).bfloat16(), linear(8, 16, 1).bfloat16(), torch.tensor([1, target, -1], device=DEVICE), 15.0
    )
    assert losses.isnan().tolist() == [False, True, False]


LOSS_EDITS = {
    "a bias": (lambda: nn.Linear(8, 16), 3, 15.0),
    "a head of another kind": (lambda: Doubled(8, 16, bias=False), 3, 15.0),
    "no rows": (lambda: nn.Linear(8, 16, bias=False), 0, 15.0),
    "no cap": (lambda: nn.Linear(8, 16, bias=False), 3, None),
    "a cap of 0": (lambda: nn.Linear(8, 16, bias=False), 3, 0),
    "a cap of infinity": (lambda: nn.Linear(8, 16, bias=False), 3, math.inf),
    "a high cap": (lambda: nn.Linear(8, 16, bias=False), 3, 50.0),
    "a large vocabulary": (lambda: nn.Linear(8, 2**15 + 1, bias=False), 3, 15.0),
}


@pytest.mark.parametrize("edit", LOSS_EDITS)
def test_a_loss_that_the_kernel_does_not_cover_is_plain(with_kernels, edit):
    make_head, rows, cap = LOSS_EDITS[edit]
    head, x, targets = make_head(), torch.randn(rows, 8), torch.tensor([1, -1, 7])[:rows]
    logits = head(x)
    if cap and cap < math.inf:
        logits = cap * torch.tanh(logits / cap)
    expected = F.cross_entropy(logits, targets, ignore_index=-1, reduction="none")
    assert torch.equal(prepare.softcap_loss(x, head, targets, cap), expected)


# ---------------------------------------------------------------------------------------------------------------------
# The same kernels on the CPU
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(prepare.triton is None, reason="no Triton here")
def test_in_tritons_interpreter_every_kernel_is_plain_mathematics():
    script = ROOT / "tests" / "interpreted_kernels.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=300)
    *lines, no_token = done.stdout.splitlines() or [""]
    assert no_token == "no token: [nan, nan]", done.stderr
    errors = [line.split(": ") for line in lines]
    counts = {"attention": 4, "attention, turned": 4, "mlp": 4, "projected": 12, "loss": 3}
    assert [name for name, _ in errors] == [name for name, count in counts.items() for _ in range(count)]
    assert all(float(error) < 2e-2 for _, error in errors)  # it rounds bf16 toward zero


# ---------------------------------------------------------------------------------------------------------------------
# Where there are no kernels
# ---------------------------------------------------------------------------------------------------------------------


def test_without_a_gpu_mlp_and_loss_are_the_plain_ones():
    torch.manual_seed(0)
    c_in, c_out, x = nn.Linear(4, 8, bias=False), nn.Linear(8, 4, bias=False), torch.randn(2, 3, 4)
    assert torch.equal(prepare.relu2_mlp(x, c_in, c_out), c_out(c_in(x).relu() ** 2))
    head, targets = nn.Linear(4, 5, bias=False), torch.tensor([0, 4, -1])
    log_p = (15 * torch.tanh(head(x[0]) / 15)).log_softmax(-1)
    expected = torch.stack([-log_p[0, 0], -log_p[1, 4], torch.tensor(0.0)])
    assert torch.allclose(prepare.softcap_loss(x[0], head, targets, 15.0), expected)


def test_an_amd_gpu_whose_number_begins_with_9_has_no_kernels(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert not prepare.has_kernels(torch.device("cuda"))


def test_without_triton_everything_else_works():
    code = "import sys; sys.modules['triton'] = None; import prepare; print(prepare.triton, prepare.jit(len)('four'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "None 4\n", done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# The compiler's cache
# ---------------------------------------------------------------------------------------------------------------------


def test_a_program_with_operators_of_its_own_has_a_compilers_cache_of_its_own(tmp_path):
    """The cache knows an operator by its name, and would keep an earlier version's gradient."""
    (tmp_path / "train.py").write_text("import torch.library\n")
    prepare.Run(tmp_path / "train.py")
    shas = [prepare.sha256_file(path) for path in (ROOT / "prepare.py", tmp_path / "train.py")]
    assert torch.compiler.config.cache_key_tag == "".join(shas)


def test_an_edit_without_operators_of_its_own_keeps_the_compilers_cache(tmp_path):
    edited = tmp_path / "train.py"
    edited.write_text((ROOT / "train.py").read_text() + "# edited\n")
    prepare.Run(edited)
    assert torch.compiler.config.cache_key_tag == prepare.sha256_file(ROOT / "prepare.py")
