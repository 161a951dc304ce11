"""Writes benchmarks/roofline-tpu.md: what the TPU kernels should take, from shapes alone. Needs no TPU.

python benchmarks/roofline.py
"""

from pathlib import Path

from jaxdet.models.registry import family_of
from jaxdet.roofline import tpu
from jaxdet.roofline.chips import CHIPS, GIB, MIB
from jaxdet.roofline.step import LABEL, UTILIZATION, Decode, Estimate, Expected, Prefill, expect
from jaxdet.testing import QWEN3_8B, SMOLLM2

MODELS = {"SmolLM2-135M": SMOLLM2, "Qwen3-8B": QWEN3_8B}
CONTEXT = 1024
WORKS = (*(Decode(rows, CONTEXT) for rows in (1, 8, 64, 256)), Prefill(2048))
DETAILED = (Decode(64, CONTEXT), Prefill(2048))
NAMES = ("v5e", "v6e")
SAMPLED = (1, 8, 64, 256)
"""Rows of logits."""

PAGE = Path(__file__).with_name("roofline-tpu.md")

HEAD = f"""# TPU kernels: {LABEL}
No TPU has run these kernels. The figures are arithmetic: `python benchmarks/roofline.py` writes this page from the
kernels' own block shapes and the chips' published limits (`jaxdet/roofline/`).

A kernel is given the longest of three times: its bytes at HBM's bandwidth, blocks that are fetched again included; its
dots on the matrix unit, each padded to the unit's edge, two small ones never sharing it; its elementwise operations on
the vector unit, whose rate is published for v5p, derived for v5e and assumed for v6e. Kernels follow one another.
Nothing is counted for launches, for a kernel's first fetch, for latencies or for the host, so a step takes longer,
a small model's much longer. bfloat16; decode at {CONTEXT} tokens of context; greedy sampling in the steps.
"sample, drawn" has temperature, top-k and top-p in every row; "top logprobs" is XLA's search for the most likely
tokens, of which only three passes over the logits are counted.

"Matrix use" is the share of the matrix unit's work that is no padding. A decode step's rows are padded to 128 and
an attention tile's to about 64 by design: where HBM is the bound, padding costs nothing.
"""


def page() -> str:
    chips = [chip for chip in CHIPS if chip.name in NAMES]
    lines = [
        HEAD,
        "| chip | bf16 TFLOP/s | HBM GB/s | HBM GiB | VMEM MiB | matrix unit | vector Gop/s |",
        "|---" * 7 + "|",
    ]
    for c in chips:
        lines.append(
            f"| {c.name} | {c.flops / 1e12:.0f} | {c.bandwidth / 1e9:.0f} | {c.hbm / GIB:.0f} | {c.vmem / MIB:.0f} | "
            f"{c.edges[1]} × {c.edges[2]} | {c.vector / 1e9:.0f} |"
        )
    for model, raw in MODELS.items():
        config = family_of(raw).read_config(raw)
        steps = [expect(config, work, chip) for work in WORKS for chip in chips]
        lines += ["", f"## {model}", *step_table(steps)]
        for work in DETAILED:
            of = [step for step in steps if step.work == work]
            lines += ["", f"### {model}, {work}, one call of each kernel", *kernel_table(of)]
        lines += [
            "",
            f"### {model}, sampling and log-probabilities, one call",
            *sampling_table(config.vocab_size),
        ]
    return "\n".join(lines) + "\n"


def sampling_table(vocab: int) -> list[str]:
    """For every TPU, not only those of the other tables."""
    chips = [chip for chip in CHIPS if chip.platform == "tpu"]
    lines = [
        "| kernel | rows | blocks | MB | vector Mop | "
        + " | ".join(f"expected µs {c.name}, bound" for c in chips)
        + " |",
        "|---" * (5 + len(chips)) + "|",
    ]
    for rows in SAMPLED:
        for k in (tpu.sample(rows, vocab), tpu.draw(rows, vocab), *tpu.token_logprobs(rows, vocab)):
            cells = [k.name, str(rows), k.blocks or "–", f"{k.bytes / 1e6:,.2f}"]
            cells.append(f"{k.vector / 1e6:,.1f}" if k.vector else "–")
            cells += [chip_cells(Estimate(k, chip))[1] for chip in chips]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def step_table(steps: list[Expected]) -> list[str]:
    lines = [
        "| step | chip | expected ms | expected tokens/s | bound by HBM, matrix, vector unit | weights and cache |",
        "|---" * 6 + "|",
    ]
    for s in steps:
        shares = ", ".join(f"{share:.0%}" for share in s.shares.values())
        room = UTILIZATION * s.chip.hbm / GIB
        size = f"{s.resident / GIB:.1f} GiB" + (
            "" if s.fits else f", more than {room:.1f}: needs another chip"
        )
        lines.append(
            f"| {s.work} | {s.chip.name} | {s.seconds * 1e3:.2f} | {s.tokens_per_second:,.0f} | {shares} | {size} |"
        )
    return lines


def kernel_table(steps: list[Expected]) -> list[str]:
    names = [s.chip.name for s in steps]
    lines = [
        "| kernel | calls | blocks | MB | GFLOP | "
        + " | ".join(f"matrix use {n} | expected µs {n}, bound" for n in names)
        + " |",
        "|---" * (5 + 2 * len(names)) + "|",
    ]
    for row in zip(*(s.estimates for s in steps), strict=True):
        k = row[0].kernel
        cells = [
            k.name,
            str(k.calls),
            k.blocks or "–",
            f"{k.bytes / 1e6:,.2f}",
            f"{k.flops / 1e9:,.2f}" if k.flops else "–",
        ]
        cells += [cell for estimate in row for cell in chip_cells(estimate)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def chip_cells(e: Estimate) -> tuple[str, str]:
    use = "–" if e.matrix_use is None else f"{e.matrix_use:.1%}"
    return use, f"{e.seconds / e.kernel.calls * 1e6:,.1f} {e.bound}"


if __name__ == "__main__":
    PAGE.write_text(page())
