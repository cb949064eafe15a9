"""Small corpora of text files."""

import numpy as np

from areal_ray.config import DataConfig
from areal_ray.data import build_tokenizer
from areal_ray.data.corpus import planning, prepare
from areal_ray.data.corpus.corpus import Corpus
from areal_ray.data.splits import open_splits
from areal_ray.storage import LocalStorage


def plan_for(sources, folder, held_out=0.25):
    config = DataConfig(source="text", paths=[str(sources)], held_out=held_out)
    return planning.make_plan(config, build_tokenizer("bytes"), LocalStorage(folder))


def prepared(sources, folder, **settings):
    plan = plan_for(sources, folder, **settings)
    prepare.prepare(plan, prepare.in_process, print)
    return Corpus(plan.work.storage)


def splits(corpus, seq_len):
    return open_splits(DataConfig(), {"": corpus}, seq_len)


def tokens(rows):
    return rows[np.arange(len(rows))]["input_ids"].flatten().tolist()
