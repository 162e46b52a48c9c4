"""prepare.py's kernels in Triton's interpreter, on the CPU: prints a relative error a line, against float64.

Run by test_kernels.py. The interpreter of Triton 3.6 knows neither numpy 2.4's scalars nor products of bf16 (which it
holds as integers, and rounds toward zero): both are put right here.
"""

import os
import sys
from functools import partial
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
import triton.language as tl
import triton.runtime.interpreter as interpreter
from test_kernels import (
    attend_projected,
    bf16,
    linear,
    plain_attention,
    plain_mlp,
    plain_projected,
    relative_errors,
    rotary_tables,
)

import prepare

patch_lang_tensor, create_dot = interpreter._patch_lang_tensor, interpreter.InterpreterBuilder.create_dot


def patch_scalars(tensor, scope):
    patch_lang_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def widened(handle):
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


interpreter._patch_lang_tensor = patch_scalars
interpreter.InterpreterBuilder.create_dot = lambda self, a, b, *rest: create_dot(self, widened(a), widened(b), *rest)
prepare.has_kernels = lambda device: True
prepare._is_bf16_on_gpu = lambda x: True


def show(name: str, errors: list[float]) -> None:
    for error in errors:
        print(f"{name}: {error:.2e}")


def attention() -> None:
    B, T, H, KV, D = 1, 128, 2, 1, 64
    wide = bf16(B, T, (H + 2 * KV) * D).detach().bfloat16()
    parts = wide.split([H * D, KV * D, KV * D], dim=2)  # rows of a wider matrix
    for tables in ((), rotary_tables(T, D)):
        leaves = [part.view(B, T, -1, D).detach().requires_grad_() for part in parts]
        errors = relative_errors(
            lambda *qkv, tables=tables: prepare.window_attention(*qkv, *tables, window=70),
            lambda *qkv, tables=tables: plain_attention(*qkv, tables, 70),
            *leaves,
        )
        show("attention, turned" if tables else "attention", errors)


def launch_plain_strips(a, b, out, other, finish, turning) -> None:
    """What the kernel by strips computes. It is Gluon's, which the interpreter does not know."""
    cos, sin, factors, T, num_heads = turning
    product = (a @ b.T).view(-1, T, num_heads, cos.size(2)).float()
    turned = prepare.turn(product, cos, sin).bfloat16().view(len(a), -1)
    out.copy_(turned[:, : out.size(1)])
    other.copy_(turned[:, out.size(1) :])
    factors.copy_(product.square().mean(-1).rsqrt().view(len(a), -1))


def projected() -> None:
    prepare.gluon, prepare._launch_strips = prepare, launch_plain_strips
    B, T, H, KV, D, width = 1, 64, 2, 1, 128, 24
    x, more_v, tables = bf16(B, T, width), bf16(B, T, KV, D, seed=1), rotary_tables(T, D)
    linears = [linear(heads * D, width, 2 + i) for i, heads in enumerate((H, KV, KV))]
    for window in (40, None):
        for layer in linears:
            layer.weight.grad = None
        errors = relative_errors(
            lambda x, more_v, *_, window=window: attend_projected(x.bfloat16(), more_v, linears, tables, window),
            partial(plain_projected, tables=tables, window=window),
            *(leaf.detach().requires_grad_() for leaf in (x, more_v)),
            *(layer.weight for layer in linears),
        )
        show("projected", errors)


def mlp() -> None:
    c_in, c_out = linear(40, 24, 1).bfloat16(), linear(16, 40, 2).bfloat16()
    memory = bf16(24, 33).detach().bfloat16()
    for x in (memory.T, memory.T.contiguous()[:, 1:].repeat(1, 2)[:, 1:25]):  # transposed, unaligned
        leaf = x.detach().requires_grad_()
        plain = partial(plain_mlp, w_in=c_in.weight.double(), w_out=c_out.weight.double())
        show("mlp", relative_errors(lambda x: prepare.relu2_mlp(x, c_in, c_out), plain, leaf))


def loss() -> None:
    x, head = bf16(5, 16).detach(), linear(100, 16, 1)
    targets = torch.tensor([3, 0, -1, 0, 99, 0, -100, 0, 100, 0])[::2]
    losses = prepare.softcap_loss(x, head, targets, 15.0)
    log_p = (15 * torch.tanh(head(x).double() / 15)).log_softmax(-1)
    show("loss", [(losses[0] + log_p[0, 3]).abs().item(), losses[1].item(), (losses[2] + log_p[2, 99]).abs().item()])
    print("no token:", losses[3:].tolist())


if __name__ == "__main__":
    attention()
    mlp()
    projected()
    loss()
