"""Tokens a second of generating text: PocketZO, onnxruntime-genai on the same graph, transformers on its checkpoint.

The programs take turns, so that a busy machine slows them alike; each reads the same random tokens and continues them
greedily. onnxruntime-genai runs the bundle's generate.onnx. It and torch with transformers are left out where they are
not installed: `pip install onnxruntime-genai`.

    python bench/generation.py BUNDLE --checkpoint DIR --threads 1
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from machine import Run

import pocketzo as pz
from pocketzo.runtime.decoder import Decoder
from pocketzo.runtime.generate import open_decoder
from pocketzo.train.run import Unloaded

Continue = Callable[[list[int], int], Iterator[int]]
"""Continues a prompt by a number of tokens; yields each as soon as it is known."""


def ours(decoder: Decoder) -> Continue:
    def tokens(prompt: list[int], count: int) -> Iterator[int]:
        reading = decoder.begin()
        unread = prompt
        for _ in range(count):
            unread = [int(reading.logits(unread).argmax())]
            yield unread[0]

    return tokens


def live(bundle: pz.Bundle, threads: int) -> Continue:
    """Weights in memory, as of a run or of a loaded model."""
    loaded = Unloaded(bundle)
    return ours(open_decoder(bundle, loaded.weights.image, threads))


def genai(bundle: pz.Bundle, threads: int, folder: Path) -> Continue:
    import onnxruntime_genai as og

    session = ort.InferenceSession(bundle.generate_path, providers=["CPUExecutionProvider"])
    inputs = {value.name: value for value in session.get_inputs()}
    layers = sum(bool(re.fullmatch(r"past_key_values\.\d+\.key", name)) for name in inputs)
    heads, size = inputs["past_key_values.0.key"].shape[1::2]
    vocabulary = session.get_outputs()[0].shape[-1]
    del session
    for file in bundle.path.iterdir():
        (folder / file.name).symlink_to(file.resolve())
    names = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
    pasts, presents = (
        {f"{kind}_{part}_names": f"{name}.%d.{part}" for part in ("key", "value")}
        for kind, name in (("past", "past_key_values"), ("present", "present"))
    )
    config = {
        "model": {
            "type": "llama",
            "context_length": 2048,
            "vocab_size": vocabulary,
            "bos_token_id": 0,
            "eos_token_id": 0,  # which must be a token; `min_length` keeps it from ending a text
            "pad_token_id": 0,
            "decoder": {
                "filename": bundle.generate_path.name,
                "session_options": {"intra_op_num_threads": threads, "provider_options": []},
                "inputs": {**names, **pasts},
                "outputs": {"logits": "logits", **presents},
                "num_hidden_layers": layers,
                "num_attention_heads": heads,
                "num_key_value_heads": heads,
                "head_size": size,
                "hidden_size": heads * size,
            },
        },
        "search": {"do_sample": False, "max_length": 2048, "past_present_share_buffer": False},
    }
    (folder / "genai_config.json").write_text(json.dumps(config))
    model = og.Model(str(folder))

    def tokens(prompt: list[int], count: int) -> Iterator[int]:
        length = len(prompt) + count
        params = og.GeneratorParams(model)
        params.set_search_options(min_length=length, max_length=length, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(np.array(prompt, np.int32))
        for _ in range(count):
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    return tokens


def transformers(checkpoint: Path, threads: int) -> Continue:
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()

    def tokens(prompt: list[int], count: int) -> Iterator[int]:
        unread, past = torch.tensor([prompt]), None
        for _ in range(count):
            with torch.inference_mode():
                output = model(unread, past_key_values=past, use_cache=True, logits_to_keep=1)
            past, unread = output.past_key_values, output.logits[:, -1].argmax(-1, keepdim=True)
            yield int(unread)

    return tokens


def measured(program: Continue, prompt: list[int], count: int) -> tuple[float, float, list[int]]:
    """Return the seconds to the first token, the median seconds of each that follows, and the tokens."""
    times, tokens = [time.perf_counter()], []
    for token in program(prompt, count):
        times.append(time.perf_counter())
        tokens.append(token)
    steps = np.diff(times)
    return float(steps[0]), float(np.median(steps[1:])), tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--checkpoint", type=Path, help="the folder of the same model for transformers")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    run = Run()
    bundle = pz.Bundle.read(args.bundle)

    programs: dict[str, Continue] = {
        "pocketzo": ours(open_decoder(bundle, None, args.threads)),
        "pocketzo, weights in memory": live(bundle, args.threads),
    }
    folder = tempfile.TemporaryDirectory()
    if importlib.util.find_spec("onnxruntime_genai"):
        programs["onnxruntime-genai"] = genai(bundle, args.threads, Path(folder.name))
    if args.checkpoint and importlib.util.find_spec("transformers"):
        programs["transformers"] = transformers(args.checkpoint, args.threads)

    prompt = np.random.default_rng(0).integers(1, 1000, args.prompt_tokens).tolist()
    results: dict[str, list[tuple[float, float, list[int]]]] = {name: [] for name in programs}
    for _ in range(args.rounds):
        for name, program in programs.items():
            results[name].append(measured(program, prompt, args.tokens))
    rows: dict[str, dict[str, Any]] = {}
    for name, rounds in results.items():
        rows[name] = {
            "prompt tokens a second": round(args.prompt_tokens / min(first for first, _, _ in rounds), 1),
            "tokens a second": round(1 / min(step for _, step, _ in rounds), 1),
            "same tokens as pocketzo": all(tokens == results["pocketzo"][0][2] for _, _, tokens in rounds),
        }
        print(f"{name:30}", ", ".join(f"{key} {value}" for key, value in rows[name].items()))
    facts = {"prompt_tokens": args.prompt_tokens, "tokens": args.tokens, "threads": args.threads}
    run.finish(facts | {"rows": rows}, args.json)


if __name__ == "__main__":
    main()
