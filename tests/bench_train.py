"""Where the time of a run goes, on the GPU at hand: start-up, one step by kind of kernel, evaluation, the rest.

    uv run python tests/bench_train.py          as an experiment finds it: compile caches where they are
    uv run python tests/bench_train.py --cold   with empty compile caches
    uv run python tests/bench_train.py --parts  what each change for speed brings: a step without it, side by side

Needs a GPU and prepared data. Takes about a minute, --parts about three; nothing is written but compile caches.
"""

import argparse
import contextlib
import gc
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

sys.path.insert(0, str(Path(__file__).parent.parent))

class Phases:
    """Seconds between marks, the first since the process started."""

    def __init__(self, age_s: float):
        self.rows, self.last = [("Python, torch and scripts imported", age_s)], time.perf_counter()

    def mark(self, name: str) -> None:
        now = time.perf_counter()
        self.rows.append((name, now - self.last))
        self.last = now


def table(title: str, rows: list[tuple[str, float]], unit: str) -> None:
    total = sum(value for _, value in rows)
    print(f"\n{title}")
    for name, value in [*rows, ("sum", total)]:
        print(f"  {name:44} {value:8.2f} {unit} {value / total:6.1%}")


def bench() -> None:
    gc.disable()  # as train.py does
    import train  # before torch: it says how torch is to be started
    import torch  # isort: skip

    import prepare

    phases = Phases(prepare.process_age_s())
    device = prepare.get_device()
    torch.zeros(1, device=device)
    torch.cuda.synchronize()
    phases.mark("CUDA started")
    tokenizer, model = train.build(device)
    optimizers = train.make_optimizers(model)
    phases.mark("model and optimizers built")
    batches = prepare.make_dataloader(tokenizer, train.CONFIG.device_batch_size, prepare.MAX_SEQ_LEN, "train")
    first = next(batches)
    torch.cuda.synchronize()
    phases.mark("first batch loaded")
    num_micro_steps = train.CONFIG.total_batch_size // first[0].numel()
    train.warm_up(model, optimizers, first, num_micro_steps)
    torch.cuda.synchronize()
    phases.mark("compiled, warmed up, measured")
    table(f"start-up, {torch.cuda.get_device_name()}, torch {torch.__version__}", phases.rows, "s")

    data_s: list[float] = []

    def timed_batches():
        while True:
            begin = time.perf_counter()
            batch = next(batches)
            data_s.append(time.perf_counter() - begin)
            yield batch

    def gradients():
        return train.forward_backward(model, timed_batches(), num_micro_steps)

    # The loop of train.py without its log: a step's end is read when the next one is queued.
    train.set_schedules(optimizers, train.CONFIG, 0, 0.0)
    clock, step_ms = prepare.Clock(device), []
    values, _ = gradients()
    clock.start()
    data_s.clear()
    for _ in range(40):
        train.update(optimizers)
        clock.end_step(values)
        values, _ = gradients()
        clock.read_step()
        step_ms.append(1000 * clock.step_seconds)
    median_ms = statistics.median(step_ms)
    waiting_ms = 1000 * sum(data_s) / len(step_ms)
    rate = train.CONFIG.total_batch_size / median_ms * 1000
    peak = prepare.peak_flops(torch.cuda.get_device_name())
    mfu = f"{100 * model.flops_per_token() * rate / peak:.1f} %" if peak else "unknown"
    print(f"\nstep: {median_ms:.1f} ms (median of {len(step_ms)}; {min(step_ms):.1f} to {max(step_ms):.1f}), MFU {mfu}")
    print(f"peak memory: {torch.cuda.max_memory_allocated() / 2**20:.0f} MB; kernels: {sorted(prepare.kernels_used)}")
    by_kind = prepare.measure_step(gradients, lambda: train.update(optimizers), 1, device)
    rows = sorted(by_kind.items(), key=lambda row: -row[1])
    rows.append(("the rest: idle, or slower than when profiled", max(median_ms - sum(by_kind.values()), 0.0)))
    table("one step on the GPU", rows, "ms")
    print(f"  the Python thread waits {waiting_ms:.2f} ms a step for batches, while the GPU is busy with the last")

    with tempfile.TemporaryDirectory() as scratch, train.autocast(device):
        os.chdir(scratch)  # where evaluate_bpb writes its record
        torch.cuda.synchronize()
        begin = time.perf_counter()
        val_bpb = prepare.evaluate_bpb(model, tokenizer, train.CONFIG.device_batch_size)
        print(f"\nevaluation: {time.perf_counter() - begin:.2f} s (val_bpb {val_bpb:.3f} after {len(step_ms)} steps)")


@contextlib.contextmanager
def patched(changes: list[tuple[object, str, object]]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module, name, value in changes:
            stack.enter_context(mock.patch.object(module, name, value))
        yield


def bench_parts() -> None:
    """A step's time with each part replaced by plain torch: one process, one GPU, the variants by turns."""
    gc.disable()
    import train
    import torch  # isort: skip

    import prepare

    attend_window = prepare.window_attention

    def turn_apart(q, k, v, cos, sin, *, window):
        return attend_window(prepare.turn(q, cos, sin), prepare.turn(k, cos, sin), v, window=window)

    def project_apart(attend, x, c_q, c_k, c_v, head_dim, cos, sin):
        q, k, v = (linear(x).view(*x.shape[:2], -1, head_dim) for linear in (c_q, c_k, c_v))
        return v, lambda v: attend(q, k, v, cos, sin)

    parts = {
        "a mask for the windows": [(prepare, "can_attend_window", lambda *sizes: False)],
        "plain MLP": [(train, "relu2_mlp", lambda x, c_in, c_out: c_out(c_in(x).relu().square()))],
        "the MLP's product in tiles": [(prepare, "MAX_STRIP_WIDTH", 0)],
        "plain soft cap and loss": [(prepare, "MAX_FUSED_VOCAB", 0)],
        "queries, keys and values in three products": [(train, "project", project_apart)],
        "norm and rotation apart from attention": [
            (train, "project", project_apart),
            (prepare, "window_attention", turn_apart),
        ],
    }
    variants = {"as it is": []} | parts | {"all of these": [change for changes in parts.values() for change in changes]}
    torch._dynamo.config.recompile_limit = 100  # the variants share code
    device = prepare.get_device()
    tokenizer = prepare.Tokenizer.from_directory()
    batches = prepare.make_dataloader(tokenizer, train.CONFIG.device_batch_size, prepare.MAX_SEQ_LEN, "train")
    first = next(batches)
    num_micro_steps = train.CONFIG.total_batch_size // first[0].numel()
    trained, step_ms, losses, peak_mb = {}, {}, {}, {}
    for name, changes in variants.items():
        with patched(changes):
            begin = time.perf_counter()
            _, model = train.build(device)
            trained[name] = model, train.make_optimizers(model)
            train.warm_up(*trained[name], first, num_micro_steps)
            torch.cuda.synchronize()
            print(f"{name}: compiled in {time.perf_counter() - begin:.1f} s", flush=True)
        train.set_schedules(trained[name][1], train.CONFIG, 0, 0.0)
        step_ms[name], losses[name] = [], []
    steps, turns = 6, 5
    data = [[next(batches) for _ in range(num_micro_steps)] for _ in range(steps * turns)]  # the same for each variant
    for turn in range(turns):
        for name, (model, optimizers) in trained.items():
            with patched(variants[name]):
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated()  # by all variants
                begin = time.perf_counter()
                for step in range(turn * steps, (turn + 1) * steps):
                    values, _ = train.forward_backward(model, iter(data[step]), num_micro_steps)
                    train.update(optimizers)
                torch.cuda.synchronize()
                step_ms[name].append(1000 * (time.perf_counter() - begin) / steps)
            peak_mb[name] = (torch.cuda.max_memory_allocated() - held) / 2**20
            losses[name].append(values["train/loss"].item())
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}: {turns} turns of {steps} steps each")
    print(f"  {'':44} {'step, median':>12} {'lowest':>9} {'to as it is':>11} {'memory':>9}  last loss")
    base = step_ms["as it is"]
    for name, ms in step_ms.items():
        ratio = statistics.median(a / b for a, b in zip(ms, base, strict=True))
        row = f"{statistics.median(ms):9.1f} ms {min(ms):6.1f} ms {ratio:11.3f} {peak_mb[name]:6.0f} MB"
        print(f"  {name:44} {row}  {losses[name][-1]:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Where the time of a run goes.")
    parser.add_argument("--cold", action="store_true", help="use empty compile caches")
    parser.add_argument("--parts", action="store_true", help="what each change for speed brings")
    options = parser.parse_args()
    if options.parts:
        return bench_parts()
    if not options.cold:
        return bench()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor", "TRITON_CACHE_DIR": f"{scratch}/triton"}
        bench()


if __name__ == "__main__":
    main()
