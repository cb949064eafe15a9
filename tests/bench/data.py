"""Corpora of 13 MB and 1 GB: preparing (killed on the way, too), start, restart and memory with each; one on S3.

The text is Python's standard library, varied: every copy has its lines in another order. Preparing goes through the
command, peak memory is that of all its processes, Ray's among them. Start and restart are those of the tiny experiment,
on corpora that are prepared already. Beside preparing stands `datasets.map` over the same files with as many processes:
with bytes, and with a vocabulary of 16,384 that is made of the text.
"""

from __future__ import annotations

import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

import psutil

from areal_ray.config import DataConfig
from areal_ray.data.build import build_source
from areal_ray.data.corpus.manifest import Manifest
from areal_ray.storage import storage_at

from . import arms, report
from .launch import ROOT, Cluster, Job, end, environment, tree
from .memory import proportional
from .options import Options
from .restart import measure

SIZES_MB = (13, 1000)
KILLS = 3
WORDS, WORDS_MB = 16_384, 400  # tokens of the vocabulary, and the text that is cut by it: six groups of 64 MiB
WARM, STEPS = 10, 40  # steps that are left out, and measured, with the corpus on disk or in S3
_LOOK_S = 0.5


def write_text(folder: Path, megabytes: int) -> None:
    """Files of real text, about a megabyte each."""
    source = build_source(DataConfig())
    texts = [document.content for part in source.parts() for document in source.read(part)]
    folder.mkdir(parents=True)
    written = number = 0
    while written < megabytes * 1_000_000:
        draw = random.Random(number)
        lines: list[bytes] = []
        for text in draw.sample(texts, 40):
            shuffled = text.splitlines(keepends=True)
            draw.shuffle(shuffled)
            lines += shuffled
        data = b"".join(lines)[: megabytes * 1_000_000 - written]
        (folder / f"{number:05}.txt").write_bytes(data)
        written, number = written + len(data), number + 1


def overrides(text: Path, prepared: str) -> list[str]:
    return ["data=text", f"data.paths=[{text}]", f"data.prepared_path={prepared}"]


def command(text: Path, prepared: Path, tokenizer: str = "bytes") -> list[str]:
    own = [*overrides(text, str(prepared)), f"run.storage_path={prepared.parent}/runs"]
    if tokenizer != "bytes":  # in as many processes as datasets.map, though it is no large corpus
        own += [f"data.tokenizer={tokenizer}", f"model.config.vocab_size={WORDS}", "data.prepare_in_process_mb=1"]
    return [sys.executable, "-m", "areal_ray.cli.main", "prepare", "--config", arms.EXPERIMENT, *own]


def prepare(text: Path, prepared: Path, stop_after_s: float | None = None) -> tuple[float, float]:
    """Seconds, and peak GB of all processes; killed, with all that it has started, after some seconds."""
    began, peak = time.monotonic(), 0
    process = subprocess.Popen(command(text, prepared), cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL)
    seen: dict[int, psutil.Process] = {}
    while process.poll() is None:
        processes = tree(process.pid)
        seen |= {each.pid: each for each in processes}
        peak = max(peak, sum(proportional(each.pid)[0] for each in processes))
        if stop_after_s is not None and time.monotonic() - began > stop_after_s:
            break
        time.sleep(_LOOK_S)
    took = time.monotonic() - began
    if stop_after_s is None and process.wait():
        raise RuntimeError(f"{command(text, prepared)} ended with {process.returncode}")
    end([each for each in seen.values() if each.is_running()])
    process.wait()
    return took, peak / 1e9


def tokenizing(folder: Path, options: Options) -> list[dict]:
    """Tokens/s of both commands, from their start to their end."""
    shown = []
    for megabytes, tokenizer in ((max(SIZES_MB), "bytes"), (WORDS_MB, write_tokenizer(folder))):
        text = folder / f"text-{megabytes}"
        if not text.exists():
            write_text(text, megabytes)
        rates: dict[str, list[float]] = {"areal_ray": [], "datasets.map": []}
        for number in range(options.rounds):
            for arm in Options.order(list(rates), number):
                rates[arm].append(rate(arm, text, folder / "tokenized", tokenizer))
                report.said(arm, f"{megabytes} MB, {rates[arm][-1]:,.0f} tokens/s")
        name = "bytes" if tokenizer == "bytes" else f"a vocabulary of {WORDS:,}"
        title = f"preparing {megabytes:,} MB of text as {name}, beside datasets.map"
        shown.append(report.show(title, "tokens/s", rates, "datasets.map", report.HIGHER))
    return shown


def rate(arm: str, text: Path, out: Path, tokenizer: str) -> float:
    own = command(text, out, tokenizer)
    peer = [sys.executable, "-m", "tests.bench.peers.datasets_map", str(text), str(out), tokenizer]
    began = time.monotonic()
    ran = subprocess.run(
        own if arm == "areal_ray" else peer,
        cwd=ROOT,
        env=environment(HF_HUB_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1"),
        stdout=subprocess.PIPE,
        check=True,
    )
    took = time.monotonic() - began
    splits = manifest(out).splits if arm == "areal_ray" else {}
    tokens = sum(shard.tokens for shards in splits.values() for shard in shards) or int(ran.stdout.split()[-1])
    for left in (out, Path(f"{out}.cache")):
        shutil.rmtree(left, ignore_errors=True)
    return tokens / took


def write_tokenizer(folder: Path) -> str:
    """A byte-level BPE of WORDS tokens, made of some of the text; its directory."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=WORDS, special_tokens=["<|end|>"], show_progress=False)
    source = build_source(DataConfig())
    texts = (each.content.decode(errors="replace") for part in source.parts() for each in source.read(part))
    tokenizer.train_from_iterator(texts, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>").save_pretrained(folder / "words")
    return str(folder / "words")


def manifest(prepared: Path) -> Manifest:
    """Of the only corpus in a folder."""
    (found,) = [path.parent for path in prepared.glob("*/manifest.json")]
    return Manifest.read(storage_at(str(found)))


def preparing(folder: Path, megabytes: int) -> list[dict]:
    text, prepared = folder / f"text-{megabytes}", folder / f"prepared-{megabytes}"
    write_text(text, megabytes)
    took, peak = prepare(text, prepared)
    figures = {"seconds": took, "MB/s": megabytes / took, "peak GB of all processes": peak}
    shown = [report.figures(f"preparing {megabytes:,} MB of text as bytes, by command", **figures)]
    if megabytes == max(SIZES_MB):
        again = folder / "killed"
        for number in range(KILLS):
            prepare(text, again, stop_after_s=took * (number + 1) / (KILLS + 2))
        finished, _ = prepare(text, again)
        same = manifest(again).files == manifest(prepared).files
        title = f"preparing {megabytes:,} MB, killed {KILLS} times before"
        shown.append(report.figures(title, **{"seconds of the last try": finished, "the same bytes": float(same)}))
        shutil.rmtree(again)
    return shown


def first_step(job: Job) -> float:
    return job.wait(lambda: job.events("step"))[0]["time"] - job.began


def memory(job: Job) -> float:
    """GB of a rank, the larger of two."""
    pids = [job.events("step", rank)[-1]["pid"] for rank in range(2)]
    return max(proportional(pid)[0] for pid in pids) / 1e9


def training(folder: Path, options: Options) -> list[dict]:
    starts: dict[str, list[float]] = {}
    restarts: dict[str, list[float]] = {}
    sizes: dict[str, list[float]] = {}
    with Cluster(2) as cluster:
        for number in range(options.rounds + 1):  # the first one fills the page cache
            for megabytes in SIZES_MB if number % 2 == 0 else SIZES_MB[::-1]:
                own = overrides(folder / f"text-{megabytes}", str(folder / f"prepared-{megabytes}"))
                with arms.started("areal_ray", arms.Task(every=10, overrides=tuple(own)), cluster.address) as job:
                    started = first_step(job)
                    job.wait(lambda job=job: len(job.events("step")) > 15 and len(job.events("step", 1)) > 15)
                    taken = memory(job)
                    took = measure(job, number % 2, 2.0).seconds
                report.said(f"{megabytes} MB", f"start {started:.2f} s, restart {took:.2f} s, {taken:.3f} GB a rank")
                if number:
                    name = f"{megabytes} MB"
                    starts.setdefault(name, []).append(started)
                    restarts.setdefault(name, []).append(took)
                    sizes.setdefault(name, []).append(taken)
    reference = f"{min(SIZES_MB)} MB"
    return [
        report.show("command to first step, corpus prepared", "s", starts, reference),
        report.show("SIGKILL of a worker to the next step, corpus prepared", "s", restarts, reference),
        report.show("memory of a rank (PSS), corpus prepared", "GB", sizes, reference),
    ]


def reading(folder: Path, options: Options) -> list[dict]:
    """Tokens/s with the corpus on disk and on the test S3 server."""
    from tests.s3_server import BUCKET, S3Server

    small = folder / f"prepared-{min(SIZES_MB)}"
    (name,) = [path.parent.name for path in small.glob("*/manifest.json")]
    server = S3Server(folder / "s3")
    server.start()
    rates: dict[str, list[float]] = {"disk": [], "S3": []}
    try:
        far = f"s3://{BUCKET}/corpora"
        storage = storage_at(f"{far}/{name}", server.options)
        for path in sorted((small / name).iterdir(), key=lambda path: path.name == "manifest.json"):
            storage.replace(path.name, path.read_bytes())
        s3 = [f"run.s3.{key}={value}" for key, value in server.options.items()]
        for number in range(options.rounds):
            for place in ("disk", "S3") if number % 2 == 0 else ("S3", "disk"):
                own = overrides(folder / f"text-{min(SIZES_MB)}", str(small) if place == "disk" else far)
                task = arms.Task(overrides=tuple([*own, *(s3 if place == "S3" else [])]))
                with arms.started("areal_ray", task) as job:
                    job.wait(lambda job=job: len(job.events("step")) > WARM + STEPS)
                    times = [line["time"] for line in job.events("step")][WARM : WARM + STEPS + 1]
                steps = [after - before for before, after in pairwise(times)]
                rates[place].append(task.tokens / statistics.median(steps))
                report.said(place, f"{rates[place][-1]:,.0f} tokens/s")
    finally:
        server.stop()
    return [report.show("tokens/s, corpus on disk and on the test S3 server", "tokens/s", rates, "disk", report.HIGHER)]


def run(options: Options) -> list[dict]:
    folder = Path(tempfile.mkdtemp(prefix="areal_ray-data-"))
    try:
        prepared = [table for megabytes in SIZES_MB for table in preparing(folder, megabytes)]
        beside = tokenizing(folder, options)
        return [*prepared, *beside, *training(folder, options), *reading(folder, options)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
