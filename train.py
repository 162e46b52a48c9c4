"""Train a GPT for exactly TIME_BUDGET seconds on one GPU, score it, and leave a record of what happened.

    uv run train.py > run.log 2>&1
    uv run train.py --score          score checkpoint.pt again, after an evaluation that failed

Reads the data that prepare.py made. Writes run_start.json, metrics.jsonl (one line a step), checkpoint.pt,
eval_record.json and, when all is done, run_summary.json. This is the one file that experiments change.

make_attention, project, relu2_mlp and softcap_loss come from prepare.py, with kernels for Hopper GPUs. Write plain
torch in their place whenever an idea needs it: the compiler fuses that too. `kernels:` in the log names those in use.
"""

import contextlib
import copy
import gc
import itertools
import os
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

# Read when torch starts. Less fragmentation; and the compiler chooses by rule, not by timing, so that every run of the
# same code has the same kernels.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("TORCHINDUCTOR_DETERMINISTIC", "1")
if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--score"]):
        is_help = sys.argv[1:] in (["-h"], ["--help"])
        print(__doc__ if is_help else "error: usage: train.py [--score]", file=sys.stdout if is_help else sys.stderr)
        sys.exit(0 if is_help else 2)
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until a run begins, an interrupt is nothing to talk about
    gc.disable()  # a tenth off the imports below, and no collection in mid-run that would hold up the GPU

# First, for it says where Python keeps its bytecode.
from prepare import (
    DEMO, MAX_SEQ_LEN, SEED_OFFSET, Run, Tokenizer, copy_weights, end_children, evaluate_bpb, get_device,
    kernels_used, layer_stats, make_attention, make_dataloader, measure_step, parameter_stats,
    project, rehearse_evaluation, relu2_mlp, sdpa_order, softcap, softcap_loss,
)  # fmt: skip

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

# -------------------------------------------------------------------------------------------------
# Hyperparameters
# -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Config:
    # Model (in the demo: sizes that two CPU cores can train)
    depth: int = 4 if DEMO else 8  # blocks
    aspect_ratio: int = 32 if DEMO else 64  # width = depth * aspect_ratio, rounded up to a multiple of head_dim
    head_dim: int = 32 if DEMO else 128
    num_kv_heads: int | None = None  # None: as many as query heads
    window_pattern: str = "SSSL"  # repeated over the layers; L: full context, S: half of it; the last layer is L
    mlp_ratio: float = 4  # hidden width of the MLP / width; rounded to a multiple of 8
    rotary_base: float = 10_000.0
    logit_cap: float | None = 15.0  # logits lie within +- this; None: anywhere
    x0_lambda_init: float = 0.1  # weight of the embedding in each block's input
    # Batch
    total_batch_size: int = 2**11 if DEMO else 2**19  # tokens a step
    device_batch_size: int = 8 if DEMO else 128  # sequences a forward pass; lower it when memory runs out
    # Optimizer
    embedding_lr: float = 0.6  # AdamW, token and value embeddings; at width 768, as the next
    unembedding_lr: float = 0.004  # AdamW, lm_head
    scalar_lr: float = 0.5  # AdamW, x0_lambdas; a hundredth of it for resid_lambdas
    adam_betas: tuple[float, float] = (0.8, 0.95)
    x0_betas: tuple[float, float] = (0.96, 0.95)  # AdamW, x0_lambdas
    vector_lr: float = 0.005  # AdamW, whatever in the blocks is no matrix (nothing is, as it stands)
    matrix_lr: float = 0.04  # Muon, every matrix in the blocks
    muon_beta2: float = 0.95  # of Muon's second moment
    weight_decay: float = 0.2  # Muon, cautious; falls to 0 over the run
    # Schedules
    warmup_ratio: float = 0.0  # fraction of the time budget
    warmdown_ratio: float = 0.5  # fraction of the time budget
    final_lr_frac: float = 0.0  # learning rate at the end / at its highest
    muon_momentum_start: float = 0.85
    muon_momentum: float = 0.95
    muon_momentum_steps: int = 300  # from the one to the other
    seed: int = 42  # not an idea: a gain from another seed is noise


CONFIG = Config()


# -------------------------------------------------------------------------------------------------
# Model
# -------------------------------------------------------------------------------------------------


def norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, (x.size(-1),))


def rotary_tables(seq_len: int, head_dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """(cos, cos) and (sin, -sin), each (T, 1, head_dim)."""
    frequencies = base ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float32, device=device), frequencies)[:, None, :]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1), torch.cat((sin, -sin), dim=-1)


def layer_windows(config: Config, seq_len: int) -> list[int]:
    """How many positions before itself each layer's query sees."""
    sizes, pattern = {"L": seq_len, "S": seq_len // 2}, config.window_pattern
    if not pattern or not set(pattern) <= set(sizes):
        raise ValueError(f"window_pattern {pattern!r}: one or more of the letters {', '.join(sizes)} are wanted")
    windows = [sizes[pattern[i % len(pattern)]] for i in range(config.depth)]
    return [*windows[:-1], seq_len]


def has_value_embedding(layer: int, depth: int) -> bool:
    """Every second layer, the last one included."""
    return layer % 2 == (depth - 1) % 2


class Attention(nn.Module):
    def __init__(self, model: "GPT", layer: int):
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim = model.num_heads, model.num_kv_heads, model.config.head_dim
        width, kv_width = model.width, self.num_kv_heads * self.head_dim
        self.c_q = nn.Linear(width, width, bias=False)
        self.c_k = nn.Linear(width, kv_width, bias=False)
        self.c_v = nn.Linear(width, kv_width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)
        self.gate_width = min(32, width)
        has_ve = has_value_embedding(layer, model.config.depth)
        self.ve_gate = nn.Linear(self.gate_width, self.num_kv_heads, bias=False) if has_ve else None
        self.attend = model.attentions[layer][1]

    def forward(self, x: Tensor, ve: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, _ = x.shape
        # v is c_v(x), and attend(v) is self.attend(c_q(x), c_k(x), v, cos, sin), fused where it can be: attention of
        # norm(q) and norm(k), rotated; without the tables, of q and k.
        v, attend = project(self.attend, x, self.c_q, self.c_k, self.c_v, self.head_dim, cos, sin)
        if ve is not None:
            gate = 2 * torch.sigmoid(self.ve_gate(x[..., : self.gate_width]))  # (B, T, KV), 1 at the start
            v = v + gate.unsqueeze(-1) * ve.view(v.shape)
        return self.c_proj(attend(v).reshape(B, T, -1))


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.c_fc = nn.Linear(width, hidden, bias=False)
        self.c_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return relu2_mlp(x, self.c_fc, self.c_proj)  # c_proj(relu(c_fc(x)) ** 2), fused where it can be


class Block(nn.Module):
    def __init__(self, model: "GPT", layer: int):
        super().__init__()
        self.attn = Attention(model, layer)
        self.mlp = MLP(model.width, 8 * round(model.config.mlp_ratio * model.width / 8))

    def forward(self, x: Tensor, ve: Tensor | None, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.attn(norm(x), ve, cos, sin)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    def __init__(self, config: Config, vocab_size: int, seq_len: int, device: torch.device):
        super().__init__()
        self.config = config
        heads = -(-config.depth * config.aspect_ratio // config.head_dim)  # rounded up
        self.num_heads, self.width = heads, heads * config.head_dim
        self.num_kv_heads = config.num_kv_heads or heads
        if heads % self.num_kv_heads:
            raise ValueError(f"num_kv_heads {self.num_kv_heads} does not divide the number of heads, {heads}")
        self.windows = layer_windows(config, seq_len)
        kinds = {w: make_attention(w, seq_len, config.head_dim, device) for w in sorted(set(self.windows))}
        self.attentions = [kinds[w] for w in self.windows]
        # What init_weights leaves alone keeps torch's own initial values. They take no random numbers from the rest.
        with device, torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(config.seed + 1_000_000)
            self.wte = nn.Embedding(vocab_size, self.width)
            self.blocks = nn.ModuleList(Block(self, i) for i in range(config.depth))
            ve_layers = [str(i) for i in range(config.depth) if has_value_embedding(i, config.depth)]
            kv_width = self.num_kv_heads * config.head_dim
            self.value_embeds = nn.ModuleDict({i: nn.Embedding(vocab_size, kv_width) for i in ve_layers})
            self.lm_head = nn.Linear(self.width, vocab_size, bias=False)
            self.resid_lambdas = nn.Parameter(torch.ones(config.depth))
            self.x0_lambdas = nn.Parameter(torch.full((config.depth,), config.x0_lambda_init))
        cos, sin = rotary_tables(seq_len, config.head_dim, config.rotary_base, device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        bound = 3**0.5 * self.width**-0.5  # a uniform distribution of standard deviation width ** -0.5
        nn.init.normal_(self.wte.weight, std=1.0)
        nn.init.normal_(self.lm_head.weight, std=0.001)
        for block in self.blocks:
            for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v, block.mlp.c_fc):
                nn.init.uniform_(linear.weight, -bound, bound)
            nn.init.zeros_(block.attn.c_proj.weight)
            nn.init.zeros_(block.mlp.c_proj.weight)
            if block.attn.ve_gate is not None:
                nn.init.zeros_(block.attn.ve_gate.weight)
        for embedding in self.value_embeds.values():
            nn.init.uniform_(embedding.weight, -bound, bound)
        if self.wte.weight.is_cuda:
            self.wte.to(torch.bfloat16)
            self.value_embeds.to(torch.bfloat16)

    def forward(self, idx: Tensor, targets: Tensor | None = None, reduction: str = "mean") -> Tensor:
        """idx, targets: int64 (B, T). Returns logits (B, T, vocab), or with targets the loss in
        nats.

        "none", (B * T,), is the score: the plain cross-entropy of these logits, and nothing else.
        Terms that only training wants go into "mean"; the log has the plain loss beside it.
        """
        x = self.features(idx)
        if targets is None:
            return softcap(self.lm_head(x).float(), self.config.logit_cap)
        losses = self.token_losses(x, targets)
        return losses if reduction == "none" else losses.sum() / (targets != -1).sum()

    # These two are compiled, each by itself; training and evaluation share their graphs.

    def features(self, idx: Tensor) -> Tensor:
        x = x0 = norm(self.wte(idx))  # (B, T, width)
        cos, sin = self.cos[: idx.size(1)], self.sin[: idx.size(1)]
        for i, block in enumerate(self.blocks):
            x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * x0
            ve = self.value_embeds[str(i)](idx) if str(i) in self.value_embeds else None
            x = block(x, ve, cos, sin)
        return norm(x)

    def token_losses(self, x: Tensor, targets: Tensor) -> Tensor:
        return softcap_loss(x.flatten(0, 1), self.lm_head, targets.flatten(), self.config.logit_cap)

    def num_params_by_group(self) -> dict[str, int]:
        """By the first part of their names; a tensor that two modules share counts once."""
        counts: dict[str, int] = {}
        for name, p in self.named_parameters():
            group = "scalars" if "." not in name else name.partition(".")[0]
            counts[group] = counts.get(group, 0) + p.numel()
        return counts

    def flops_per_token(self) -> int:
        """Forward and backward: 6 a weight that multiplies (a table is only looked up), and for
        attention 12 a channel and visible position."""
        modules = [m for m in self.modules() if not isinstance(m, nn.Embedding)]
        weights = {p: p.numel() for m in modules for p in m.parameters(recurse=False) if p.dim() > 1}
        attention = sum(12 * self.width * min(window, self.cos.size(0)) for window in self.windows)
        return 6 * sum(weights.values()) + attention


# -------------------------------------------------------------------------------------------------
# Optimizer (Muon for the matrices in the blocks, AdamW for the rest)
# -------------------------------------------------------------------------------------------------

# Coefficients of X <- aX + (bA + cA^2)X, A = XX^T (Polar Express, Amsel et al. 2025: arXiv:2505.16932).
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def orthogonalize(g: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices to g (n, rows, cols), roughly: singular values near 1.
    In bf16."""
    # The norm stays in fp32: the polynomials are steepest at the largest singular value, and the rounding of a bf16
    # norm shifts it enough to show in the loss of the first hundred steps.
    X = (g / (1.02 * g.norm(dim=(-2, -1), keepdim=True) + 1e-6)).bfloat16()
    is_tall = g.size(-2) > g.size(-1)
    X = X.mT if is_tall else X  # A is then the smaller of the two products
    for a, b, c in POLAR_EXPRESS:
        A = X @ X.mT
        X = torch.baddbmm(X, torch.baddbmm(A, A, A, beta=b, alpha=c), X, beta=a)
    return X.mT if is_tall else X


def muon_update(grad: Tensor, momentum_buffer: Tensor, second: Tensor, momentum: float, beta2: float) -> Tensor:
    """The direction of a Muon step for matrices (n, rows, cols); `momentum_buffer` and `second`
    are updated in place.

    Muon (Jordan et al. 2024) with Nesterov momentum, and NorMuon's variance reduction (Li et al.
    2025): one second moment a row or column, whichever there are more of, then the norm of each
    matrix is restored.
    """
    momentum_buffer.lerp_(grad, 1 - momentum)
    g = orthogonalize(grad.lerp(momentum_buffer, momentum)).float()
    dim = -1 if g.size(-2) >= g.size(-1) else -2
    mean_square = g.square().mean(dim, keepdim=True)
    second.lerp_(mean_square, 1 - beta2)
    scale = second.clamp_min(1e-10).rsqrt()
    norms = [t.sum(dim=(-2, -1), keepdim=True).sqrt() for t in (mean_square, mean_square * scale.square())]
    return g * (scale * (norms[0] / norms[1].clamp_min(1e-10)))


class Muon(torch.optim.Optimizer):
    """Groups hold matrices of one shape, which are stepped together as one (n, rows, cols) tensor.
    A matrix that had no part in this step's loss has a gradient of zero."""

    def __init__(self, groups: list[dict]):
        super().__init__(groups, defaults={})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            params = group["params"]
            grad = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in params])
            state = self.state[params[0]]
            if not state:
                rows, cols = params[0].shape
                state["momentum_buffer"] = torch.zeros_like(grad)
                state["second"] = grad.new_zeros((len(params), rows, 1) if rows >= cols else (len(params), 1, cols))
            g = muon_update(grad, state["momentum_buffer"], state["second"], group["momentum"], group["beta2"])
            p = torch.stack(params)
            # Cautious: weights decay only where the step does not already move them away from zero.
            decay = group["lr"] * group["weight_decay"] * p * (g * p >= 0)
            torch._foreach_sub_(params, list((group["lr"] * g + decay).unbind()))


def make_optimizers(model: GPT) -> list[torch.optim.Optimizer]:
    """AdamW and Muon. Every group gets a `name`, and its highest learning rate as `max_lr`."""
    config = model.config
    width_scale = (model.width / 768) ** -0.5
    embedding_lr, unembedding_lr = config.embedding_lr * width_scale, config.unembedding_lr * width_scale
    matrices = [p for p in model.blocks.parameters() if p.dim() == 2]
    vectors = [p for p in model.blocks.parameters() if p.dim() != 2]
    adam = [
        {"name": "lm_head", "params": [model.lm_head.weight], "lr": unembedding_lr},
        {"name": "wte", "params": [model.wte.weight], "lr": embedding_lr},
        {"name": "value_embeds", "params": list(model.value_embeds.parameters()), "lr": embedding_lr},
        {"name": "resid_lambdas", "params": [model.resid_lambdas], "lr": config.scalar_lr * 0.01},
        {"name": "x0_lambdas", "params": [model.x0_lambdas], "lr": config.scalar_lr, "betas": config.x0_betas},
        {"name": "vectors", "params": vectors, "lr": config.vector_lr},
    ]
    if model.lm_head.weight is model.wte.weight:  # tied: one tensor, stepped as the head
        adam = [group for group in adam if group["name"] != "wte"]
    muon = [
        {
            "name": f"muon_{rows}x{cols}",
            "params": [p for p in matrices if p.shape == (rows, cols)],
            "lr": config.matrix_lr * max(1, rows / cols) ** 0.5,
            "beta2": config.muon_beta2,
        }
        for rows, cols in dict.fromkeys(p.shape for p in matrices)
    ]
    adam = [group for group in adam if group["params"]]
    optimizers = [torch.optim.AdamW(adam, betas=config.adam_betas, eps=1e-10, weight_decay=0, fused=True), Muon(muon)]
    check_groups(model, param_groups(optimizers))
    return optimizers


def check_groups(model: nn.Module, groups: list[dict]) -> None:
    """Every parameter in exactly one group, every group with a name of its own and its `max_lr`."""
    for i, group in enumerate(groups):
        group["max_lr"] = group["lr"]
        group.setdefault("name", f"group_{i}")
    names, grouped = [group["name"] for group in groups], [p for group in groups for p in group["params"]]
    if len(set(names)) < len(names):
        raise ValueError(f"two optimizer groups have one name: {', '.join(names)}")
    missing = [name for name, p in model.named_parameters() if not any(p is other for other in grouped)]
    if missing or len(set(grouped)) < len(grouped):
        raise ValueError(f"every parameter in exactly one optimizer group: {', '.join(missing) or 'one is in two'}")


def param_groups(optimizers: list[torch.optim.Optimizer]) -> list[dict]:
    return [group for optimizer in optimizers for group in optimizer.param_groups]


# -------------------------------------------------------------------------------------------------
# Schedules (progress: training seconds so far / budget)
# -------------------------------------------------------------------------------------------------


def lr_scale(progress: float, *, warmup: float, warmdown: float, final: float) -> float:
    """Factor on every learning rate: linear warm-up, 1, then linear to `final`."""
    if progress < warmup:
        return progress / warmup
    if progress < 1 - warmdown:
        return 1.0
    left = (1 - progress) / warmdown if warmdown else 0.0
    return left + (1 - left) * final


def momentum_at(step: int, *, start: float, end: float, num_steps: int) -> float:
    share = min(step / num_steps, 1.0) if num_steps else 1.0
    return (1 - share) * start + share * end


def weight_decay_at(progress: float, *, start: float) -> float:
    return start * (1 - progress)


def set_schedules(optimizers: list[torch.optim.Optimizer], config: Config, step: int, progress: float) -> dict:
    """Set this step's learning rates, momentum and weight decay. Returns them for the log."""
    c = config
    scale = lr_scale(progress, warmup=c.warmup_ratio, warmdown=c.warmdown_ratio, final=c.final_lr_frac)
    momentum = momentum_at(step, start=c.muon_momentum_start, end=c.muon_momentum, num_steps=c.muon_momentum_steps)
    weight_decay = weight_decay_at(progress, start=c.weight_decay)
    for group in param_groups(optimizers):
        group["lr"] = group["max_lr"] * scale
        if group["name"].startswith("muon"):
            group["momentum"], group["weight_decay"] = momentum, weight_decay
    return {
        "train/lr_multiplier": scale,
        "train/muon_momentum": momentum,
        "train/weight_decay": weight_decay,
        **{f"lr/{group['name']}": group["lr"] for group in param_groups(optimizers)},
    }


# -------------------------------------------------------------------------------------------------
# Training
# -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def autocast(device: torch.device) -> Iterator[None]:
    """bf16 matrix products and the fastest attention on the GPU; the CPU computes in fp32."""
    if device.type != "cuda":
        yield
        return
    # Set here and not where attention is called: inside the graph, it would keep the compiler's cache from being used.
    with torch.autocast("cuda", torch.bfloat16), sdpa_kernel(sdpa_order(), set_priority=True):
        yield


def forward_backward(model: nn.Module, batches: Iterator, num_micro_steps: int) -> tuple[dict[str, Tensor], tuple]:
    """Add the gradients of one step's batch. Returns what the log wants of it, not waited for, and
    the last batch."""
    losses, token_sum = [], 0
    for _ in range(num_micro_steps):
        x, y, epoch = next(batches)
        with autocast(x.device):
            loss = model(x, y)
        (loss / num_micro_steps).backward()
        losses.append(loss.detach())
        token_sum = token_sum + x.sum()
    losses = torch.stack(losses)
    values = {"train/loss": losses.mean(), "train/data_sum": token_sum}
    return values | ({"train/micro_losses": losses} if num_micro_steps > 1 else {}), (x, y, epoch)


def update(optimizers: list[torch.optim.Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def warm_up(model: GPT, optimizers: list[torch.optim.Optimizer], batch: tuple, num_micro_steps: int) -> dict | None:
    """Compile and load every kernel with real shapes, score a batch, see where a step's time goes
    (returned); then put everything back: weights, buffers, optimizers, random state."""
    x, y, _ = batch
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    before = {name: t.detach().clone() for name, t in tensors.items()}
    states = [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers]

    def gradients() -> None:
        forward_backward(model, iter([batch]), 1)

    with torch.random.fork_rng([x.device] if x.is_cuda else []):
        set_schedules(optimizers, model.config, step=0, progress=0.0)
        gradients()
        update(optimizers)
        profile = measure_step(gradients, lambda: update(optimizers), num_micro_steps, x.device)
        with autocast(x.device):
            rehearse_evaluation(model.eval(), x, y)
        model.train().zero_grad()
    with torch.no_grad():
        for name, t in tensors.items():
            t.copy_(before[name])
    for optimizer, state in zip(optimizers, states, strict=True):
        optimizer.load_state_dict(state)
    return profile


def compile_parts(model: GPT) -> None:
    for name in ("features", "token_losses"):
        setattr(model, name, torch.compile(getattr(model, name), dynamic=False))


def build(device: torch.device) -> tuple[Tokenizer, GPT]:
    torch.manual_seed(CONFIG.seed + SEED_OFFSET)
    torch.set_float32_matmul_precision("high")
    tokenizer = Tokenizer.from_directory()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty then gives NaN
    model = GPT(CONFIG, tokenizer.get_vocab_size(), MAX_SEQ_LEN, device)
    torch.use_deterministic_algorithms(False)
    forgotten = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    if forgotten:
        raise ValueError(f"not initialised: {', '.join(forgotten)}")
    if device.type == "cuda":
        compile_parts(model)
    return tokenizer, model


def describe(model: GPT) -> dict:
    """The resolved configuration, as it goes into the summary."""
    counts = model.num_params_by_group()
    return {
        **asdict(model.config),
        "seed": model.config.seed + SEED_OFFSET,
        "num_kv_heads": model.num_kv_heads,
        "width": model.width,
        "num_heads": model.num_heads,
        "window_sizes": model.windows,
        "attention_backend": ", ".join(dict.fromkeys(name for name, _ in model.attentions)),
        "num_params_M": sum(counts.values()) / 1e6,
        **{f"num_params_{name}": count for name, count in counts.items()},
        "flops_per_token": model.flops_per_token(),
    }


def train(run: Run) -> tuple[Tokenizer, GPT, dict]:
    """Returns the trained model, and all of the summary that is known before the score."""
    device = get_device()
    tokenizer, model = build(device)
    optimizers = make_optimizers(model)
    facts = describe(model)
    for key in ("attention_backend", "width", "num_heads", "window_sizes", "num_params_M"):
        print(f"{key}: {facts[key]}")
    tokens_per_pass = CONFIG.device_batch_size * MAX_SEQ_LEN
    num_micro_steps, rest = divmod(CONFIG.total_batch_size, tokens_per_pass)
    if rest or not num_micro_steps:
        raise ValueError(f"total_batch_size {CONFIG.total_batch_size} is no multiple of {tokens_per_pass} (one pass)")

    batches = make_dataloader(tokenizer, CONFIG.device_batch_size, MAX_SEQ_LEN, "train")
    first = next(batches)
    facts["profile"] = warm_up(model, optimizers, first, num_micro_steps)
    facts["kernels"] = ", ".join(sorted(kernels_used)) or "none"  # those of prepare.py that took part
    print(f"kernels: {facts['kernels']}")
    batches = itertools.chain([first], batches)  # the warm-up used up nothing of the data

    run.start_training(device, facts)
    next_look = 0.0  # progress at which the layers are looked at again
    for step in itertools.count():
        # Forward and backward. The GPU works on them while the step before is read from it and logged, in `progress`.
        values, (x, y, epoch) = forward_backward(model, batches, num_micro_steps)
        # Schedule
        progress = run.progress()
        if progress >= 1:
            break  # these last gradients are dropped: only a step that changes weights counts
        schedule = set_schedules(optimizers, CONFIG, step, progress)
        # Step
        stats, is_look = {}, progress >= next_look
        before = copy_weights(model) if is_look else {}
        values["train/grad_norm"] = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        for optimizer in optimizers:
            optimizer.step()
        if is_look:
            next_look = progress + 0.01
            with run.clock.paused(), autocast(device):
                stats = layer_stats(model, x[:1], y[:1]) | parameter_stats(model, before)
        for optimizer in optimizers:
            optimizer.zero_grad()
        # Log
        num_tokens = num_micro_steps * x.numel()
        run.log_step(step, num_tokens, values, {"train/progress": progress, "train/epoch": epoch} | schedule | stats)
    model.zero_grad()
    return tokenizer, model, run.end_training(model)


def score(run: Run, tokenizer: Tokenizer, model: GPT, summary: dict) -> None:
    begin = time.perf_counter()
    model.eval()
    with autocast(get_device()):
        val_bpb = evaluate_bpb(model, tokenizer, model.config.device_batch_size)
    run.finish(summary, val_bpb, time.perf_counter() - begin)


def main() -> None:
    is_new = not sys.argv[1:]
    with Run(Path(__file__), is_new) as run:
        if is_new:
            score(run, *train(run))
        else:  # the checkpoint that a failed evaluation left behind, as the run that it was
            tokenizer, model = build(get_device())
            score(run, tokenizer, model, run.load_checkpoint(model))


if __name__ == "__main__":
    try:
        main()
        code = 0
    except SystemExit as end:  # the reason stands in the log
        code = end.code
    end_children()
    sys.stdout.flush()
    os._exit(code)  # all is written: without this, taking down the compiler, CUDA and Python takes seconds more
