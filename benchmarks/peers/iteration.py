"""A whole GRPO iteration (sample, reward, train, hand over) with vLLM: TRL in its colocated mode, and rlft.

    python benchmarks/peers/iteration.py --out DIR --commit HASH --stacks trl
    python benchmarks/peers/iteration.py --out DIR --commit HASH --stacks rlft --add DIR/grpo_iteration_8b_gpu_DATE.json

Qwen3-8B's shape with random weights and LoRA r 16, 32 prompts of 256 tokens, 8 completions of 512 each (rlft's may end
earlier, at an EOS: one token in 150,000). One stack after the other, each in a separate process; loading and vLLM's
start are not measured, nor is the first iteration.

    trl    GRPOTrainer over a bf16 base, gradient checkpointing, vLLM in sleep mode beside it. Phases: "sync", its
           weights awake again and pushed; "rollout", from cache to sleep, with the text and the log-prob objects that
           vLLM makes for TRL; "old", the texts of the completions, padding, and the log-probs that it compares with
           vLLM's; "reward"; "train". `rollout_func` calls TRL's own vLLM, as the trainer does without it, and marks the
           phases.
    rlft   rlft.trainer.loop.loop over an NF4 base with its vLLM engine. Phases: "rollout", "reward", "sleep", "train",
    "wake",
           "sync".
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parent))

from results_file import arguments, write
from timing import Watch, row
from workers import Desk, Worker

HERE = Path(__file__).parent
WORK = "grpo-iteration/8b"
PROMPTS, PROMPT, GROUP, COMPLETION = 32, 256, 8, 512
POSITIONS = 40_960
"""As published; the training benchmarks have more, and vLLM's table of rotations would be 25 times as large."""
SHARE = 0.6
"""Of the card, for TRL's vLLM: its weights and a cache of all 256 sequences."""


class Phases:
    """Seconds and GiB of each phase of an iteration."""

    def __init__(self) -> None:
        self._watch = Watch()
        self._now = "between"
        self.seconds: dict[str, float] = {}

    def begin(self, name: str) -> None:
        """A new iteration, and its first phase."""
        self._watch.enter(name)
        self._now, self.seconds = name, {}
        self._watch.most = {}

    def enter(self, name: str) -> None:
        self.seconds[self._now] = self.seconds.get(self._now, 0.0) + self._watch.enter(name)
        self._now = name

    def end(self, desk: Desk, tokens: int, note: str) -> None:
        """The iteration is over: hand it in."""
        self.enter("between")
        most = {name: gib for name, gib in self._watch.most.items() if name in self.seconds}
        desk.stop(phases=self.seconds, most=most, tokens=tokens, note=note)


def prompts_of(shape: str) -> list[tuple[int, ...]]:
    import torch
    from stacks import SHAPES

    g = torch.Generator().manual_seed(0)
    most = min(150_000, SHAPES[shape]["vocab_size"])
    return [tuple(torch.randint(10, most, (PROMPT,), generator=g).tolist()) for _ in range(PROMPTS)]


def alternate(completions: list[Any], **columns: Any) -> list[float]:
    """A reward that costs nothing and leaves no group of equal ones."""
    return [float(i % 2) for i in range(len(completions))]


def trl(shape: str, micro: int, desk: Desk) -> None:
    # stdout is for answers.
    os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    # TRL says "localhost", which not every machine knows.
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    from datasets import Dataset
    from stacks import base_of, lora, tokenizer_of
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    phases, sampled = Phases(), [0]

    class Steps(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            desk.wait()
            desk.start()
            phases.begin("sync")

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            note = f"bf16 base, micro-batches of {micro}, {SHARE:.0%} of the card for vLLM"
            phases.end(desk, sampled[0], f'{note}; its correction for vLLM takes one more pass, "old"')

    def rollout(prompts: list[str], trainer: Any) -> dict[str, Any]:
        phases.enter("rollout")
        ids = trainer.processing_class(prompts)["input_ids"]
        _, completions, logprobs, _ = trainer.vllm_generation.generate(prompts=ids, images=None, num_generations=GROUP)
        sampled[0] = sum(map(len, completions))
        phases.enter("old")
        first = [[token[0] for token in row] for row in logprobs]
        return {"prompt_ids": ids, "completion_ids": completions, "logprobs": first}

    def reward(completions: list[Any], **columns: Any) -> list[float]:
        phases.enter("reward")
        values = alternate(completions)
        phases.enter("train")
        return values

    config = GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        max_steps=1_000_000,
        learning_rate=1e-6,
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=PROMPTS * GROUP // micro,
        num_generations=GROUP,
        max_completion_length=COMPLETION,
        use_vllm=True,
        vllm_mode="colocate",
        vllm_enable_sleep_mode=True,
        vllm_gpu_memory_utilization=SHARE,
        vllm_max_model_length=PROMPT + COMPLETION,
        generation_kwargs={"ignore_eos": True},
    )
    rows = Dataset.from_dict({"prompt": [" ".join(map(str, ids)) for ids in prompts_of(shape)]})
    trainer = GRPOTrainer(
        base_of(shape, nf4=False),
        [reward],
        config,
        train_dataset=rows,
        processing_class=tokenizer_of(shape),
        peft_config=lora(),
        rollout_func=rollout,
        callbacks=[Steps()],
    )
    trainer.train()


class Marked:
    """rlft's engine, with the phases of an iteration marked around its methods."""

    SAMPLES = True

    def __init__(self, engine: Any, desk: Desk) -> None:
        self._engine, self._desk, self._phases, self._tokens = engine, desk, Phases(), 0
        self.session: Any = None

    @property
    def memory(self) -> dict[str, int]:
        return self._engine.memory

    def generate(self, prompts: Any, sampling: Any, seed: tuple[int, ...], finished: Any = None, first: int = 0) -> Any:
        self._desk.wait()
        self._desk.start()
        self._phases.begin("rollout")
        found = self._engine.generate(prompts, sampling, seed, finished)
        self._tokens = sum(len(r.completion_ids) for r in found)
        self._phases.enter("reward")
        return found

    def sleep(self) -> None:
        self._phases.enter("sleep")
        self._engine.sleep()
        self._phases.enter("train")

    def wake(self) -> None:
        self._phases.enter("wake")
        self._engine.wake()

    def load_adapter(self, tensors: Any, version: int) -> None:
        self._phases.enter("sync")
        self._engine.load_adapter(tensors, version)
        if version:
            fused = self.session.trainer.policy.fused
            how = f"NF4 base; {getattr(self._engine, 'choice', '')}"
            note = f"{how}; micro-batches of {self.session.trainer.plan.budget} tokens"
            self._phases.end(
                self._desk, self._tokens, f"{note}; training: {fused.last_plan if fused else 'not planned'}"
            )

    def close(self) -> None:
        self._engine.close()


def rlft(shape: str, micro: int, desk: Desk) -> None:
    from longest import policy_of
    from recorded import session_of
    from stacks import tokenizer_of

    from rlft.config.data import Data, Sampling
    from rlft.config.run import Algo, Config, Engine, Lora, Optim
    from rlft.rewards.score import build_rewards
    from rlft.rollout.vllm.engine import VllmEngine
    from rlft.trainer.loop import loop
    from rlft.types import Prompt

    cfg = Config(
        shape,
        Data("random"),
        tempfile.mkdtemp(),
        steps=1_000_000,
        prompts_per_step=PROMPTS,
        quantization="nf4",
        algo=Algo("grpo"),
        sampling=Sampling(group_size=GROUP, max_tokens=COMPLETION),
        lora=Lora(rank=16, alpha=32),
        optim=Optim(lr=1e-6),
        engine=Engine("vllm", max_seqs=PROMPTS * GROUP),
    )
    policy, tokenizer = policy_of(shape), tokenizer_of(shape)
    policy.base.config.max_position_embeddings = POSITIONS  # type: ignore[union-attr]
    engine = VllmEngine(
        policy, tokenizer, cfg.engine, PROMPT + COMPLETION, PROMPTS * GROUP, note=lambda text: print(text, flush=True)
    )
    marked = Marked(engine, desk)
    rows = [Prompt(ids, {}, i) for i, ids in enumerate(prompts_of(shape))]
    marked.session = session_of(cfg, rows, policy, marked, tokenizer, functions=build_rewards([alternate]))
    loop(marked.session)


def worker(stack: str, shape: str, micro: int) -> None:
    """Run a stack until there are no more questions; what it raises is its answer."""
    desk = Desk()
    desk.loaded()
    with desk.failures():
        {"trl": trl, "rlft": rlft}[stack](shape, micro, desk)


def measure(stack: str, shape: str, micro: int, path: str, iterations: int) -> list[dict[str, Any]]:
    """Rows of the median of the iterations after the first, and of each phase's."""
    asked = Worker(stack, [__file__, "--worker", stack, shape, str(micro)], path)
    answers = [asked.ask(540.0 if not i else 240.0) for i in range(1 + iterations)]
    asked.close()
    wrong = [a["error"] for a in answers if "error" in a]
    if wrong:
        print(WORK, stack, "failed:", wrong[0], asked.errors(8000), sep="\n", flush=True)
        return [row(WORK, stack, "failed", 1.0, "", wrong[0][:400])]
    kept = answers[1:]
    tokens = kept[-1]["tokens"]
    note = f"{tokens} tokens sampled; first iteration {answers[0]['seconds']:.1f} s; {kept[-1]['note']}"
    made = [row(WORK, stack, "seconds", [a["seconds"] for a in kept], "s", note)]
    for name in kept[-1]["phases"]:
        made.append(row(WORK, stack, f"{name}_seconds", [a["phases"][name] for a in kept], "s"))
    made += [
        row(WORK, stack, f"{name}_GiB", value, "GiB", "in use on the card, as the driver says")
        for name, value in kept[-1]["most"].items()
    ]
    if most := kept[-1]["most"]:
        about = "in use on the card, as the driver says; most of it follows from the share that vLLM is given"
        made.append(row(WORK, stack, "peak_GiB", max(most.values()), "GiB", about))
    for r in made:
        print(r["work"], stack, r["metric"], r["value"], r["note"], flush=True)
    return made


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--fa4", default="")
    parser.add_argument("--stacks", nargs="+", choices=("trl", "rlft"), default=["trl", "rlft"])
    parser.add_argument("--micro", type=int, default=32, help="sequences per micro-batch of TRL")
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--add", type=Path, help="a results file of an earlier call, whose other stacks are kept")
    args = parser.parse_args()
    rows = json.loads(args.add.read_text())["rows"] if args.add else []
    rows = [r for r in rows if r["stack"] not in args.stacks]
    if "trl" in args.stacks:
        # vLLM reads TRL's model from a folder; rlft's is made where it lies.
        make = f"import sys; sys.path.insert(0, {str(HERE)!r}); import stacks; "
        make += f"stacks.make('8b', max_position_embeddings={POSITIONS})"
        subprocess.run([sys.executable, "-c", make], check=True)
    for stack in args.stacks:
        rows += measure(stack, "8b", args.micro, args.fa4 if stack == "rlft" else "", args.iterations)
        print(write(WORK.replace("/", "_").replace("-", "_"), rows, args.out, args.commit), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        worker(sys.argv[2], sys.argv[3], int(sys.argv[4]))
    else:
        main()
