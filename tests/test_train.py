"""train.py: the model against plain mathematics, the optimizer, the schedules, and real runs of a few seconds."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import explicit_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

import prepare
import train

CPU = torch.device("cpu")
SMALL = replace(
    train.Config(), depth=4, aspect_ratio=16, head_dim=16, total_batch_size=64, device_batch_size=2, num_kv_heads=2
)

gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")

# ---------------------------------------------------------------------------------------------------------------------
# Attention
# ---------------------------------------------------------------------------------------------------------------------


def qkv(B, T, H, KV, D, device=CPU, dtype=torch.float32):
    random = torch.Generator().manual_seed(1)
    shapes = [(B, T, H, D), (B, T, KV, D), (B, T, KV, D)]
    return [torch.randn(s, generator=random).to(device, dtype).requires_grad_() for s in shapes]


def relative_errors(attend, tensors, window):
    """Errors of output, dq, dk and dv against the explicit computation."""
    copies = [t.detach().clone().requires_grad_() for t in tensors]
    out, expected = attend(*tensors), explicit_attention(*copies, window)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(out.device)
    (out * weights).sum().backward()
    (expected * weights).sum().backward()
    pairs = [(out, expected), *((t.grad, c.grad) for t, c in zip(tensors, copies, strict=True))]
    return [((a.double() - b).norm() / b.norm().clamp_min(1)).item() for a, b in pairs]


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [0, 1, 5, 8, 15, 16])
def test_attention_on_the_cpu_sees_exactly_its_window(window, num_kv_heads):
    _, attend = prepare.make_attention(window, 16, 8, CPU)
    errors = relative_errors(attend, qkv(2, 16, 4, num_kv_heads, 8), window)
    assert all(error < 1e-5 for error in errors)  # as max() would not, this sees a NaN


def sdpa_of(backend):
    def attend(q, k, v):
        with sdpa_kernel(backend):
            return prepare.plain_attention(q, k, v, is_causal=True)

    return attend


GPU_ATTENTIONS = {
    "cudnn": (sdpa_of(SDPBackend.CUDNN_ATTENTION), 512),
    "flash": (sdpa_of(SDPBackend.FLASH_ATTENTION), 512),
    "chosen full": (None, 512),
    "chosen window": (None, 100),
    "chosen odd": (None, 100),  # no kernel of ours takes heads of 32
}


@gpu
@needs_gpu
@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("name", GPU_ATTENTIONS)
def test_every_attention_on_the_gpu_sees_exactly_its_window(name, num_kv_heads):
    device, head_dim = torch.device("cuda"), 32 if "odd" in name else 128
    attend, window = GPU_ATTENTIONS[name]
    if attend is None:
        _, attend = prepare.make_attention(window, 512, head_dim, device)
    tensors = qkv(2, 512, 4, num_kv_heads, head_dim, device, torch.bfloat16)
    with train.autocast(device):
        errors = relative_errors(torch.compile(attend), tensors, window)
    assert all(error < 1e-2 for error in errors)  # bf16


# ---------------------------------------------------------------------------------------------------------------------
# Model
# ---------------------------------------------------------------------------------------------------------------------


def small_model(config=SMALL, vocab_size=50, seq_len=16):
    """On the CPU, with every weight away from its special initial value."""
    torch.manual_seed(0)
    model = train.GPT(config, vocab_size, seq_len, CPU)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def reference_losses(model, idx, targets, weights=None):
    """The specification's forward pass, word for word, in float64. Returns (B * T,) losses."""
    w = weights or {name: p.double() for name, p in model.state_dict().items()}
    config, H, KV, D = model.config, model.num_heads, model.num_kv_heads, model.config.head_dim
    (B, T), half = idx.shape, D // 2

    def norm(x):
        return x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()

    def rotate(x):
        frequencies = config.rotary_base ** (-torch.arange(half, device=idx.device).double() * 2 / D)
        angle = torch.arange(T, device=idx.device).double().view(T, 1, 1) * frequencies
        x1, x2 = x[..., :half], x[..., half:]
        return torch.cat([x1 * angle.cos() + x2 * angle.sin(), -x1 * angle.sin() + x2 * angle.cos()], -1)

    x = x0 = norm(w["wte.weight"][idx])
    for i in range(config.depth):
        x = w["resid_lambdas"][i] * x + w["x0_lambdas"][i] * x0
        h, block = norm(x), f"blocks.{i}."
        q = (h @ w[block + "attn.c_q.weight"].T).view(B, T, H, D)
        k = (h @ w[block + "attn.c_k.weight"].T).view(B, T, KV, D)
        v = (h @ w[block + "attn.c_v.weight"].T).view(B, T, KV, D)
        if i % 2 == (config.depth - 1) % 2:
            gate = 2 * torch.sigmoid(h[..., :32] @ w[block + "attn.ve_gate.weight"].T)
            v = v + gate[..., None] * w[f"value_embeds.{i}.weight"][idx].view(B, T, KV, D)
        is_full = config.window_pattern[i % len(config.window_pattern)] == "L" or i == config.depth - 1
        y = explicit_attention(norm(rotate(q)), norm(rotate(k)), v, T if is_full else T // 2)
        x = x + y.reshape(B, T, H * D) @ w[block + "attn.c_proj.weight"].T
        hidden = torch.relu(norm(x) @ w[block + "mlp.c_fc.weight"].T) ** 2
        x = x + hidden @ w[block + "mlp.c_proj.weight"].T
    logits = 15 * torch.tanh(norm(x) @ w["lm_head.weight"].T / 15)
    return -logits.log_softmax(-1).gather(-1, targets[..., None]).flatten()


@pytest.mark.parametrize(
    "changes", [{}, {"num_kv_heads": None}, {"num_kv_heads": 1, "depth": 5, "window_pattern": "SL"}]
)
def test_the_forward_pass_is_the_specification(changes):
    model = small_model(replace(SMALL, **changes))
    idx = torch.randint(0, 50, (3, 16), generator=torch.Generator().manual_seed(3))
    targets = idx.roll(-1, 1)
    expected = reference_losses(model, idx, targets)
    assert torch.allclose(model(idx, targets, reduction="none").double(), expected, atol=1e-4)
    assert model(idx, targets).item() == pytest.approx(expected.mean().item(), abs=1e-5)


@gpu
@needs_gpu
@pytest.mark.parametrize(
    ("changes", "vocab_size", "seq_len"),
    [
        ({}, 1000, 256),
        ({"num_kv_heads": 1, "mlp_ratio": 3, "window_pattern": "SL"}, 777, 128),
        ({"head_dim": 32, "mlp_ratio": 5}, 8192, 200),  # no window kernel: heads too small, length no multiple of 64
    ],
)
def test_on_the_gpu_the_model_and_its_gradients_are_those_of_plain_mathematics(changes, vocab_size, seq_len):
    config = replace(SMALL, num_kv_heads=2, depth=3, aspect_ratio=128, head_dim=64)
    config = replace(config, **changes)
    model = train.GPT(config, vocab_size, seq_len, torch.device("cuda"))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    random = torch.Generator().manual_seed(3)
    idx, targets = (torch.randint(0, vocab_size, (2, seq_len), generator=random).cuda() for _ in range(2))
    plain = {name: p.detach().double().requires_grad_() for name, p in model.named_parameters()}
    expected = reference_losses(model, idx, targets, plain).mean()
    expected.backward()
    train.compile_parts(model)
    with train.autocast(torch.device("cuda")):
        loss = model(idx, targets)
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)
    for name, p in model.named_parameters():
        error = (p.grad.double() - plain[name].grad).norm() / plain[name].grad.norm()
        assert error < (0.2 if "lambdas" in name else 0.05), name  # bf16; the scalars' gradients are sums that cancel


def test_the_compiler_sees_one_graph_of_all_layers_for_training_and_scoring():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model = small_model()
    idx = torch.arange(32).view(2, 16)
    expected = model(idx, idx)
    model.features = torch.compile(model.features, dynamic=False, backend="eager", fullgraph=True)
    assert model(idx, idx).item() == pytest.approx(expected.item(), rel=1e-6)
    model.eval()(idx, idx, reduction="none")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_shorter_context_than_the_longest_is_the_same_model():
    model = small_model()
    idx = torch.arange(32).view(2, 16)
    losses = model(idx, idx.roll(-1, 1), reduction="none").view(2, 16)
    short = model(idx[:, :8], idx.roll(-1, 1)[:, :8], reduction="none").view(2, 8)
    assert torch.allclose(short, losses[:, :8], atol=1e-5)


@pytest.mark.parametrize("cap", [None, 0, float("inf"), 15.0])
def test_the_loss_is_the_cross_entropy_of_the_logits_with_a_cap_and_without(cap):
    model, idx = small_model(replace(SMALL, logit_cap=cap)), torch.arange(32).view(2, 16)
    logits = model(idx)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), idx.flatten(), reduction="none")
    assert torch.allclose(model(idx, idx, reduction="none"), expected, atol=1e-5)
    plain = model.lm_head(model.features(idx))
    assert torch.allclose(logits, 15 * torch.tanh(plain / 15) if cap == 15.0 else plain, atol=1e-5)


@pytest.mark.parametrize("pattern", ["", "sssl", "SXL"])
def test_an_unknown_window_letter_is_refused_with_those_that_there_are(pattern):
    with pytest.raises(ValueError, match=f"window_pattern '{pattern}': one or more of the letters L, S"):
        train.layer_windows(replace(SMALL, window_pattern=pattern), 16)


def test_a_fraction_of_the_width_is_a_hidden_width_of_whole_eights():
    model = small_model(replace(SMALL, mlp_ratio=2.6))
    assert model.blocks[0].mlp.c_fc.out_features == 168  # 2.6 x 64 = 166.4
    assert model(torch.arange(32).view(2, 16)).isfinite().all()


class Gated(train.Block):
    """A block with more than matrices, none of it in init_weights."""

    def __init__(self, model, layer):
        super().__init__(model, layer)
        self.gate = torch.nn.Linear(model.width, model.width)  # the bias is 1-D
        self.gain = torch.nn.Parameter(torch.ones(model.width))
        self.conv = torch.nn.Conv1d(model.width, model.width, 3, padding=2)

    def forward(self, x, *rest):
        x = super().forward(x, *rest)
        conv = self.conv(x.transpose(1, 2))[..., : x.size(1)].transpose(1, 2)
        return x + self.gain * torch.sigmoid(self.gate(x)) * conv


def step_of(model, seed=1):
    optimizers = train.make_optimizers(model)
    train.set_schedules(optimizers, model.config, 0, 0.0)
    train.forward_backward(model, iter([batch_of(seed)]), 1)
    train.update(optimizers)
    return optimizers


def test_new_matrices_vectors_and_convolutions_in_a_block_train_without_further_lines(monkeypatch):
    monkeypatch.setattr(train, "Block", Gated)
    torch.manual_seed(0)
    model = train.GPT(SMALL, 50, 16, CPU)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    groups = {group["name"]: group for group in train.param_groups(step_of(model))}
    assert len(groups["vectors"]["params"]) == 4 * 4  # bias, gain, and the convolution's two
    for name, p in model.named_parameters():
        assert p.isfinite().all(), name
        if "conv" in name or "gate" in name or "gain" in name:
            assert not torch.equal(p, before[name]) or "ve_gate" in name, name


def test_a_parameter_that_nobody_initialises_is_named(monkeypatch):
    class Forgetful(train.Block):
        def __init__(self, model, layer):
            super().__init__(model, layer)
            self.memory = torch.nn.Parameter(torch.empty(2, 3))

    monkeypatch.setattr(train, "Block", Forgetful)
    monkeypatch.setattr(train, "CONFIG", replace(SMALL, depth=2))
    monkeypatch.setattr(train.Tokenizer, "from_directory", lambda: SimpleNamespace(get_vocab_size=lambda: 50))
    with pytest.raises(ValueError, match=r"not initialised: blocks\.0\.memory, blocks\.1\.memory"):
        train.build(CPU)


def test_what_a_new_module_draws_leaves_the_other_initial_weights_alone(monkeypatch):
    torch.manual_seed(0)
    plain = train.GPT(SMALL, 50, 16, CPU)
    monkeypatch.setattr(train, "Block", Gated)
    torch.manual_seed(0)
    more = dict(train.GPT(SMALL, 50, 16, CPU).named_parameters())
    assert all(torch.equal(p, more[name]) for name, p in plain.named_parameters())


def test_tied_embeddings_are_one_tensor_counted_and_trained_once(monkeypatch):
    def init_weights(self):
        self.lm_head.weight = self.wte.weight
        plain(self)

    plain = train.GPT.init_weights
    untied = train.GPT(SMALL, 50, 16, CPU)
    monkeypatch.setattr(train.GPT, "init_weights", init_weights)
    model = train.GPT(SMALL, 50, 16, CPU)
    assert model.lm_head.weight is model.wte.weight
    assert sum(model.num_params_by_group().values()) == sum(untied.num_params_by_group().values()) - 50 * 64
    assert model.flops_per_token() == untied.flops_per_token()
    before = model.wte.weight.detach().clone()
    groups = train.param_groups(step_of(model))
    assert [group["name"] for group in groups].count("lm_head") == 1
    assert "wte" not in [group["name"] for group in groups]
    assert not torch.equal(model.lm_head.weight, before)


def test_another_table_or_head_is_counted(monkeypatch):
    model = small_model()
    counts, flops = model.num_params_by_group(), model.flops_per_token()
    model.bigrams = torch.nn.Embedding(100, 64)
    model.second_head = torch.nn.Linear(64, 50, bias=False)
    assert model.num_params_by_group() == counts | {"bigrams": 6400, "second_head": 3200}
    assert model.flops_per_token() == flops + 6 * 3200


def test_targets_of_minus_one_do_not_count():
    model, idx = small_model(), torch.arange(32).view(2, 16)
    targets = idx.roll(-1, 1)
    losses = model(idx, targets, reduction="none").view(2, 16)
    targets[1] = -1
    assert model(idx, targets).item() == pytest.approx(losses[0].mean().item(), rel=1e-6)


def test_the_default_model_has_the_published_size_and_cost():
    model = train.GPT(train.Config(), 8192, 2048, torch.device("meta"))
    assert model.num_params_by_group() == {
        "wte": 4_194_304,
        "value_embeds": 16_777_216,
        "lm_head": 4_194_304,
        "blocks": 25_166_336,
        "scalars": 16,
    }
    assert (model.width, model.num_heads, model.num_kv_heads) == (512, 4, 4)
    assert model.windows == [1024, 1024, 1024, 2048, 1024, 1024, 1024, 2048]
    assert model.flops_per_token() == 6 * (4_194_304 + 25_166_336) + 12 * 512 * (6 * 1024 + 2 * 2048)


@pytest.mark.parametrize(("depth", "aspect_ratio", "width"), [(8, 64, 512), (9, 57, 640), (1, 64, 128), (12, 64, 768)])
def test_the_width_is_rounded_up_to_whole_heads(depth, aspect_ratio, width):
    config = replace(train.Config(), depth=depth, aspect_ratio=aspect_ratio)
    assert train.GPT(config, 64, 32, torch.device("meta")).width == width


@pytest.mark.parametrize(
    ("pattern", "windows"),
    [("SSSL", [8, 8, 8, 16, 16]), ("L", [16] * 5), ("S", [8, 8, 8, 8, 16]), ("LS", [16, 8, 16, 8, 16])],
)
def test_the_window_pattern_repeats_and_the_last_layer_sees_everything(pattern, windows):
    assert train.layer_windows(replace(SMALL, depth=5, window_pattern=pattern), 16) == windows


def test_value_embeddings_alternate_and_the_last_layer_has_one():
    assert [train.has_value_embedding(i, 8) for i in range(8)] == [False, True] * 4
    assert [train.has_value_embedding(i, 3) for i in range(3)] == [True, False, True]


def test_a_number_of_kv_heads_that_does_not_divide_the_heads_is_refused():
    with pytest.raises(ValueError, match="num_kv_heads 3 does not divide the number of heads, 4"):
        train.GPT(replace(SMALL, num_kv_heads=3), 50, 16, CPU)


def test_the_initial_weights_follow_the_specification():
    torch.manual_seed(1)
    model = train.GPT(replace(SMALL, num_kv_heads=None), 2000, 16, CPU)
    block, bound = model.blocks[1], 3**0.5 * model.width**-0.5
    assert model.wte.weight.std().item() == pytest.approx(1.0, rel=0.02)
    assert model.lm_head.weight.std().item() == pytest.approx(0.001, rel=0.02)
    for weight in (block.attn.c_q.weight, block.mlp.c_fc.weight, model.value_embeds["1"].weight):
        assert bound * 0.99 < weight.abs().max().item() <= bound
        assert weight.std().item() == pytest.approx(model.width**-0.5, rel=0.02)
    for weight in (block.attn.c_proj.weight, block.mlp.c_proj.weight, block.attn.ve_gate.weight):
        assert weight.abs().max().item() == 0
    assert model.resid_lambdas.tolist() == [1.0] * 4
    assert model.x0_lambdas.tolist() == pytest.approx([0.1] * 4)


# ---------------------------------------------------------------------------------------------------------------------
# Optimizer
# ---------------------------------------------------------------------------------------------------------------------


def test_every_parameter_is_in_exactly_one_group_with_its_learning_rate():
    model = small_model(replace(SMALL, num_kv_heads=None))  # width 64
    groups = train.param_groups(train.make_optimizers(model))
    scale = (64 / 768) ** -0.5
    assert {group["name"]: pytest.approx(group["max_lr"]) for group in groups} == {
        "lm_head": 0.004 * scale,
        "wte": 0.6 * scale,
        "value_embeds": 0.6 * scale,
        "resid_lambdas": 0.005,
        "x0_lambdas": 0.5,
        "muon_64x64": 0.04,
        "muon_256x64": 0.08,  # taller by 4: twice the rate
        "muon_64x256": 0.04,
        "muon_4x32": 0.04,
    }
    assert sum(p.numel() for group in groups for p in group["params"]) == sum(p.numel() for p in model.parameters())


def test_a_parameter_without_a_group_is_noticed():
    model = small_model()
    model.extra = torch.nn.Parameter(torch.zeros(3))
    with pytest.raises(ValueError, match="every parameter in exactly one optimizer group: extra"):
        train.make_optimizers(model)


def test_groups_get_a_name_and_two_of_one_name_are_refused():
    model = torch.nn.Linear(2, 2)
    groups = [{"params": [model.weight], "lr": 0.5}, {"params": [model.bias], "lr": 0.1, "name": "bias"}]
    train.check_groups(model, groups)
    assert [(group["name"], group["max_lr"]) for group in groups] == [("group_0", 0.5), ("bias", 0.1)]
    groups[0]["name"] = "bias"
    with pytest.raises(ValueError, match="two optimizer groups have one name: bias, bias"):
        train.check_groups(model, groups)


def test_a_matrix_without_a_gradient_counts_as_zero():
    params = [torch.nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    muon = train.Muon([{"params": params, "lr": 0.1, "momentum": 0.9, "beta2": 0.95, "weight_decay": 0.0}])
    params[0].grad = torch.eye(4)
    muon.step()
    assert torch.equal(params[1], torch.ones(4, 4))
    assert not torch.equal(params[0], torch.ones(4, 4))


def test_the_adam_groups_take_the_steps_of_plain_adamw():
    model = small_model()
    adam, _ = train.make_optimizers(model)
    for group, (beta1, beta2) in zip(adam.param_groups, [(0.8, 0.95)] * 4 + [(0.96, 0.95)], strict=True):
        p = group["params"][0]
        expected, m, v = p.detach().double().clone(), 0.0, 0.0
        for t in range(1, 4):
            grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(t))
            for q in model.parameters():
                q.grad = torch.zeros_like(q)
            p.grad = grad.clone()
            adam.step()
            m, v = beta1 * m + (1 - beta1) * grad.double(), beta2 * v + (1 - beta2) * grad.double() ** 2
            expected -= group["lr"] * (m / (1 - beta1**t)) / ((v / (1 - beta2**t)).sqrt() + 1e-10)
            assert torch.allclose(p.double(), expected, atol=1e-5), group["name"]
        adam.state.clear()


@pytest.mark.parametrize("shape", [(3, 64, 64), (2, 128, 32), (2, 32, 128)])
def test_orthogonalizing_brings_the_singular_values_near_one(shape):
    g = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(train.orthogonalize(g).float())
    # A square random matrix has singular values near 0, which five steps do not lift all the way.
    is_square = shape[1] == shape[2]
    assert values.max() < 1.25
    assert values.min() > (0.02 if is_square else 0.75)
    assert values.median() == pytest.approx(1.0, abs=0.15)
    left, _, right = torch.linalg.svd(g, full_matrices=False)
    overlap = (train.orthogonalize(g).float() * (left @ right)).sum(dim=(-2, -1)) / min(shape[1:])
    assert overlap.min() > 0.9


@pytest.mark.parametrize("start", [0.01, 0.05, 0.2, 0.5, 0.9])
def test_the_polar_express_polynomials_lift_singular_values_to_one(start):
    x = start
    for a, b, c in train.POLAR_EXPRESS:
        x = a * x + b * x**3 + c * x**5
    assert x == pytest.approx(1.0, abs=0.15)


def reference_muon_step(p, grad, state, *, lr, momentum, beta2, weight_decay):
    """One Muon step for one matrix in float64, from the specification; orthogonalized by train.orthogonalize."""
    state["buffer"] = momentum * state["buffer"] + (1 - momentum) * grad
    g = (1 - momentum) * grad + momentum * state["buffer"]
    g = train.orthogonalize(g.float()[None])[0].double()
    dim = 1 if g.size(0) >= g.size(1) else 0
    state["second"] = beta2 * state["second"] + (1 - beta2) * (g**2).mean(dim, keepdim=True)
    scaled = g / state["second"].clamp_min(1e-10).sqrt()
    g = scaled * g.norm() / scaled.norm()
    return p - lr * g - lr * weight_decay * p * (g * p >= 0)


@pytest.mark.parametrize("shape", [(8, 8), (16, 4), (4, 16)])
def test_muon_steps_follow_the_specification(shape):
    random = torch.Generator().manual_seed(5)
    params = [torch.nn.Parameter(torch.randn(shape, generator=random)) for _ in range(3)]
    group = {"name": "muon", "params": params, "lr": 0.03, "momentum": 0.9, "beta2": 0.95, "weight_decay": 0.2}
    muon = train.Muon([group])
    expected = [p.detach().double() for p in params]
    states = [{"buffer": torch.zeros(shape).double(), "second": 0.0} for _ in params]
    for _ in range(3):
        for i, p in enumerate(params):
            p.grad = torch.randn(shape, generator=random)
            options = {key: group[key] for key in ("lr", "momentum", "beta2", "weight_decay")}
            expected[i] = reference_muon_step(expected[i], p.grad.double(), states[i], **options)
        muon.step()
    for p, e in zip(params, expected, strict=True):
        assert torch.allclose(p.double(), e, atol=1e-3)


# ---------------------------------------------------------------------------------------------------------------------
# Schedules
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("progress", "warmup", "warmdown", "final", "expected"),
    [
        (0.0, 0.0, 0.5, 0.0, 1.0),
        (0.49, 0.0, 0.5, 0.0, 1.0),
        (0.5, 0.0, 0.5, 0.0, 1.0),
        (0.75, 0.0, 0.5, 0.0, 0.5),
        (1.0, 0.0, 0.5, 0.0, 0.0),
        (0.75, 0.0, 0.5, 0.1, 0.55),
        (1.0, 0.0, 0.5, 0.1, 0.1),
        (0.0, 0.1, 0.5, 0.0, 0.0),
        (0.05, 0.1, 0.5, 0.0, 0.5),
        (0.9, 0.0, 0.0, 0.0, 1.0),
        (1.0, 0.0, 0.0, 0.3, 0.3),
    ],
)
def test_learning_rate_table(progress, warmup, warmdown, final, expected):
    assert train.lr_scale(progress, warmup=warmup, warmdown=warmdown, final=final) == pytest.approx(expected)


@pytest.mark.parametrize(("step", "expected"), [(0, 0.85), (150, 0.90), (300, 0.95), (1000, 0.95)])
def test_momentum_table(step, expected):
    assert train.momentum_at(step, start=0.85, end=0.95, num_steps=300) == pytest.approx(expected)


def test_momentum_without_a_rise_is_at_its_end():
    assert train.momentum_at(0, start=0.85, end=0.95, num_steps=0) == pytest.approx(0.95)


@pytest.mark.parametrize(("progress", "expected"), [(0.0, 0.2), (0.25, 0.15), (1.0, 0.0)])
def test_weight_decay_table(progress, expected):
    assert train.weight_decay_at(progress, start=0.2) == pytest.approx(expected)


def test_set_schedules_reaches_every_group():
    optimizers = train.make_optimizers(small_model())
    logged = train.set_schedules(optimizers, SMALL, step=150, progress=0.75)
    for group in train.param_groups(optimizers):
        assert group["lr"] == pytest.approx(0.5 * group["max_lr"])
        assert logged[f"lr/{group['name']}"] == group["lr"]
    for group in optimizers[1].param_groups:
        assert (group["momentum"], group["weight_decay"]) == (pytest.approx(0.90), pytest.approx(0.05))
    assert (logged["train/lr_multiplier"], logged["train/muon_momentum"]) == (0.5, pytest.approx(0.90))


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def batch_of(seed, vocab_size=50):
    tokens = torch.randint(0, vocab_size, (2, 17), generator=torch.Generator().manual_seed(seed))
    return tokens[:, :-1], tokens[:, 1:], 1


class Lion(torch.optim.Optimizer):
    """With state of its own from the start."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.01})
        for p in self.param_groups[0]["params"]:
            self.state[p]["average"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            p.sub_(0.01 * self.state[p]["average"].lerp_(p.grad, 0.1).sign())


class Counting(train.Block):
    """With a buffer that training changes, and noise."""

    def __init__(self, model, layer):
        super().__init__(model, layer)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x, *rest):
        self.calls += self.training
        return super().forward(x, *rest) + 0.01 * torch.randn(())


OPTIMIZERS = {
    "ours": train.make_optimizers,
    "lion": lambda model: [Lion([{"params": list(model.parameters()), "name": "all", "max_lr": 0.01}])],
    "adagrad": lambda model: [
        torch.optim.Adagrad([{"params": list(model.parameters()), "name": "all", "max_lr": 0.01}], lr=0.01)
    ],
}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_warm_up_leaves_no_trace(optimizer, monkeypatch):
    monkeypatch.setattr(train, "Block", Counting)
    monkeypatch.setattr(prepare, "MAX_SEQ_LEN", 16)
    monkeypatch.setattr(prepare, "find_disagreement", lambda *_: "")

    def run(is_warmed_up):
        model = small_model()
        optimizers = OPTIMIZERS[optimizer](model)
        torch.manual_seed(9)
        if is_warmed_up:
            assert train.warm_up(model, optimizers, batch_of(0), 1) is None
            assert all(p.grad is None for p in model.parameters())
        train.set_schedules(optimizers, SMALL, 0, 0.0)
        for seed in range(3):
            train.forward_backward(model, iter([batch_of(seed)]), 1)
            train.update(optimizers)
        assert model.blocks[0].calls == 3
        return [p.detach() for p in model.parameters()], torch.get_rng_state()

    (weights, rng), (expected, expected_rng) = run(True), run(False)
    assert all(torch.equal(a, b) for a, b in zip(weights, expected, strict=True))
    assert torch.equal(rng, expected_rng)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda losses: 0.97 * losses, "is not the cross-entropy of the logits"),
        (lambda losses: losses[:-1], "shape"),
    ],
)
def test_what_cannot_be_scored_fails_in_the_warm_up(change, reason, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_SEQ_LEN", 16)
    plain = train.GPT.token_losses
    monkeypatch.setattr(train.GPT, "token_losses", lambda model, x, y: change(plain(model, x, y)))
    model = small_model()
    with pytest.raises((ValueError, RuntimeError), match=reason):
        train.warm_up(model, train.make_optimizers(model), batch_of(0), 1)


def test_a_step_longer_than_the_budget_is_refused_before_it_starts(monkeypatch):
    monkeypatch.setattr(prepare, "TIME_BUDGET", 0.001)
    model = small_model()
    with pytest.raises(ValueError, match=r"a step takes about \d+ s, longer than the whole budget"):
        train.warm_up(model, train.make_optimizers(model), batch_of(0), 1000)


def test_gradients_and_losses_are_those_of_the_micro_batches():
    model, batches = small_model(), [batch_of(1), batch_of(2)]
    values, (last, _, _) = train.forward_backward(model, iter(batches), 2)
    grad = model.blocks[0].attn.c_q.weight.grad.clone()
    model.zero_grad()
    x, y = (torch.cat([batches[0][i], batches[1][i]]) for i in (0, 1))
    expected = model(x, y)
    expected.backward()
    assert values["train/loss"].item() == pytest.approx(expected.item(), rel=1e-5)
    each = [model(x, y).item() for x, y, _ in batches]
    assert values["train/micro_losses"].tolist() == pytest.approx(each, rel=1e-5)
    assert values["train/data_sum"].item() == sum(x.sum().item() for x, _, _ in batches)
    assert torch.equal(last, batches[1][0])
    assert torch.allclose(grad, model.blocks[0].attn.c_q.weight.grad, atol=1e-6)
    assert "train/micro_losses" not in train.forward_backward(model, iter(batches), 1)[0]
