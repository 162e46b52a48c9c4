"""Where the time of a run goes, on the GPU at hand: start-up, one step by kind of kernel, evaluation, the rest.

    uv run python tests/bench_train.py          as an experiment finds it: compile caches where they are
    uv run python tests/bench_train.py --cold   with empty compile caches

Needs a GPU and prepared data. Takes about a minute; nothing is written but compile caches.
"""

import argparse
import gc
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

# The kind of a kernel by its name, the first that matches.
KINDS = (
    ("attention", r"_attend|sdpa|flash|fmha|flex|compute_dot_do_o|convert_dq|attention"),
    ("MLP products with relu^2", r"_relu2_product"),
    ("matrix products", r"nvjet|gemm|cutlass|cublas|splitK|ampere|sm90_xmma"),
    ("loss", r"_softcap_loss|log_softmax|nll_loss"),
    ("norms, sums, rotary, embeddings", r""),
)


def kind_of(kernel: str) -> str:
    return next(kind for kind, pattern in KINDS if re.search(pattern, kernel, re.IGNORECASE))


def kernel_ms(work) -> dict[str, float]:
    """Milliseconds on the GPU by kind of kernel."""
    import torch
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
        work()
        torch.cuda.synchronize()
    totals: dict[str, float] = {}
    for event in profiler.key_averages():
        kind = kind_of(event.key)
        totals[kind] = totals.get(kind, 0.0) + event.self_device_time_total / 1e3
    return totals


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
    train.warm_up(model, optimizers, first)
    torch.cuda.synchronize()
    phases.mark("compiled and warmed up")
    table(f"start-up, {torch.cuda.get_device_name()}, torch {torch.__version__}", phases.rows, "s")

    num_micro_steps = train.CONFIG.total_batch_size // first[0].numel()
    data_s: list[float] = []

    def timed_batches():
        while True:
            begin = time.perf_counter()
            batch = next(batches)
            data_s.append(time.perf_counter() - begin)
            yield batch

    def gradients():
        return train.forward_backward(model, timed_batches(), num_micro_steps)

    def step():
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    # The loop of train.py without its log: a step's end is read when the next one is queued.
    train.set_schedules(optimizers, train.CONFIG, 0, 0.0)
    clock, step_ms = prepare.Clock(device), []
    loss, _ = gradients()
    clock.start()
    data_s.clear()
    for _ in range(40):
        step()
        clock.end_step([loss])
        loss, _ = gradients()
        clock.read_step()
        step_ms.append(1000 * clock.step_seconds)
    median_ms = statistics.median(step_ms)
    waiting_ms = 1000 * sum(data_s) / len(step_ms)
    rate = train.CONFIG.total_batch_size / median_ms * 1000
    peak = prepare.peak_flops(torch.cuda.get_device_name())
    mfu = f"{100 * model.flops_per_token() * rate / peak:.1f} %" if peak else "unknown"
    print(f"\nstep: {median_ms:.1f} ms (median of {len(step_ms)}; {min(step_ms):.1f} to {max(step_ms):.1f}), MFU {mfu}")
    print(f"peak memory: {torch.cuda.max_memory_allocated() / 2**20:.0f} MB; kernels: {sorted(prepare.kernels_used)}")
    by_kind = kernel_ms(gradients)
    by_kind["optimizer"] = sum(kernel_ms(step).values())
    rows = sorted(by_kind.items(), key=lambda row: -row[1])
    rows.append(("GPU idle (launches, waiting for data)", max(median_ms - sum(by_kind.values()), 0.0)))
    table("one step on the GPU", rows, "ms")
    print(f"  the Python thread waits {waiting_ms:.2f} ms a step for batches, while the GPU is busy with the last")

    with tempfile.TemporaryDirectory() as scratch, train.autocast(device):
        os.chdir(scratch)  # where evaluate_bpb writes its record
        torch.cuda.synchronize()
        begin = time.perf_counter()
        val_bpb = prepare.evaluate_bpb(model, tokenizer, train.CONFIG.device_batch_size)
        print(f"\nevaluation: {time.perf_counter() - begin:.2f} s (val_bpb {val_bpb:.3f} after {len(step_ms)} steps)")


def main() -> None:
    parser = argparse.ArgumentParser(description="Where the time of a run goes.")
    parser.add_argument("--cold", action="store_true", help="use empty compile caches")
    if not parser.parse_args().cold:
        return bench()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ |= {"TORCHINDUCTOR_CACHE_DIR": f"{scratch}/inductor", "TRITON_CACHE_DIR": f"{scratch}/triton"}
        bench()


if __name__ == "__main__":
    main()
