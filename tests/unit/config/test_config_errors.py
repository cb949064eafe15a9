"""Mistakes in a configuration: each is one line that says where, which key and what would be right."""

from pathlib import Path

import pytest

from areal_ray.cli.main import main
from areal_ray.config import ConfigError, load

pytestmark = pytest.mark.unit

TINY = str(Path(__file__).parents[3] / "conf" / "experiments" / "tiny.yaml")
MODEL = "model: {config: {model_type: qwen3}}\n"

WRONG_OVERRIDES = [
    ("train.step=3", "train.step", "did you mean 'steps'?"),
    ("trian.steps=3", "trian", "did you mean 'train'?"),
    ("train.steps=abc", "train.steps", "'abc' of type 'str' could not be converted to Integer"),
    ("train.steps=1.5", "train.steps", "could not be converted to Integer"),
    ("train.steps=", "train.steps", "None"),
    ("train.steps=[1", "train.steps", "expected ',' or ']'"),
    ("train.steps=0", "train.steps", "greater than 0"),
    ("train.seq_len=1", "train.seq_len", "at least 2"),
    ("train.stop_at=201", "train.stop_at", "between 1 and train.steps=200"),
    ("train.stop_at=0", "train.stop_at", "between 1 and train.steps=200"),
    ("train.global_batch_size=9", "train.global_batch_size", "the nearest that can: 8 or 10"),
    ("train=5", "train", "section of several keys"),
    ("run.name=!!python/object/apply:os.getcwd []", "run.name", "begins with a tag"),
    ("run.name=..", "run.name", "without '..'"),
    ("run.name=a..b", "run.name", "without '..'"),
    ("run.name=a/b", "run.name", "'a/b' must be letters"),
    ("run.name=/tmp", "run.name", "'/tmp' must be letters"),
    ("run.name=''", "run.name", "must be letters"),
    ("run.seed=-1", "run.seed", "2**32"),
    ("run.recover=maybe", "run.recover", "'auto', 'resume', 'fresh'"),
    ("run.storage_path=${oc.env:AREAL_RAY_NOT_SET}", "run.storage_path", "'AREAL_RAY_NOT_SET' not found"),
    ("optim.warmup_steps=200", "optim.warmup_steps", "train.steps=200"),
    ("optim.min_lr_ratio=1.1", "optim.min_lr_ratio", "between 0 and 1"),
    ("optim.betas=[0.9, 1.0]", "optim.betas", "in [0, 1)"),
    ("optim.betas=[0.9]", "optim.betas", "length 1"),
    ("optim.weight_decay=-0.1", "optim.weight_decay", "0 or more"),
    ("optim.lr=nan", "optim.lr", "must be a number, not nan"),
    ("engine.mesh.replicate=3", "engine.mesh.replicate", "does not divide cluster.num_workers=2"),
    ("engine.mesh.shard=3", "engine.mesh.shard", "1 x 3 x 1 must be cluster.num_workers=2"),
    ("engine.mesh.tensor=3", "engine.mesh.tensor", "does not divide cluster.num_workers=2"),
    ("engine.mesh.tensor=0", "engine.mesh.tensor", "greater than 0"),
    ("engine.precision=fp8", "engine.precision", "'float32', 'bfloat16'"),
    ("cluster.max_failures=-2", "cluster.max_failures", "-1 (no limit)"),
    ("cluster.resources_per_worker={CPU: -1}", "cluster.resources_per_worker", "CPU must not be negative"),
    ("cluster.env={CUDA_VISIBLE_DEVICES: '1'}", "cluster.env.CUDA_VISIBLE_DEVICES", "is set by the job itself"),
    ("cluster.env={RAY_ADDRESS: x}", "cluster.env.RAY_ADDRESS", "is set by the job itself"),
    ("checkpoint.every_seconds=.inf", "checkpoint.every_seconds", "must be a number, not inf"),
    ("cluster.num_workers=[1, .inf]", "cluster.num_workers[1]", "must be a number, not inf"),
    ("train.steps=10000000000000000000000", "train.steps", "less than 2**63"),
    ("train.steps=1e22", "train.steps", "could not be converted to Integer"),
    ("train.steps=1:30", "train.steps", "1:30 would be read as 90"),
    ("train.steps=010", "train.steps", "010 would be read as 8"),
    ("model.config.vocab_size=0100", "model.config.vocab_size", "0100 would be read as 64"),
    ("optim.lr=${foo}", "optim.lr", "'foo' not found"),
    ("run.name=${run.name}", "run.name", "Recursive"),
    ("run.name='${run.nam}'", "run.name", "'run.nam' not found"),
    ("run.storage_path=s3:/bucket/x", "run.storage_path", "s3://bucket/x?"),
    ("run={private: true, storage_path: s3://bucket/x}", "run.private", "the bucket's policy"),
    ("run.storage_path=s3:///bucket", "run.storage_path", "s3://bucket?"),
    ("run.storage_path=file:///tmp/x", "run.storage_path", "/tmp/x?"),
    ("cluster.env={LD_LIBRARY_PATH: '/opt:$HOME'}", "cluster.env.LD_LIBRARY_PATH", "without other variables in it"),
    ("cluster.env={'a b': x}", "cluster.env", "'a b' is no name of a variable"),
    ("cluster.resources_per_worker={GPU: 1}", "cluster.resources_per_worker", "cluster.use_gpu=false does not use"),
    ("engine.activation_checkpointing=-1", "engine.activation_checkpointing", "n for every n-th unit, not -1"),
    ("engine.activation_checkpointing=some", "engine.activation_checkpointing", "none, full, selective"),
    ("engine.offload=all", "engine.offload", "is for GPUs"),
    ("engine.offload=optimizer", "engine.offload", "'none', 'all'"),
    ("checkpoint.every=auto", "checkpoint.every", "beside it checkpoint.every_steps="),
    ("checkpoint.every=often", "checkpoint.every", "'auto'"),
    ("data.held_out=1", "data.held_out", "between 0 and 1"),
    ("data.paths=[a]", "data.paths", "the source is 'stdlib'"),
    ("data.format=preference", "data.format", "source `stdlib` has no records of format `preference`"),
    ("data.fields={body: text}", "data.fields", "of format `text` are text; not 'body'"),
    ("data.truncation=left", "data.truncation", "concatenate cuts nothing off"),
    ("data.mixture=[{name: a, weight: 0}]", "data.mixture[0].weight", "greater than 0"),
    ("data.mixture=[{name: a}, {name: a}]", "data.mixture[1].name", "another source 'a'"),
    ("data.mixture=[{name: a, source: csv}]", "data.mixture[0].paths", "needs files"),
    ("run.name=data", "run.name", "where prepared corpora lie"),
    ("data.paths[0]=a", "data.paths", ""),
    ("model.args.layers=3", "model.args", "model.factory, which is not set"),
    ("model=huge", "model", "there is no"),
    ("steps", "steps", "key=value"),
    ("=3", "=3", "key=value"),
    ("train.bad_step.on_bad=ignore", "train.bad_step.on_bad", "'stop', 'skip', 'rollback'"),
    ("train.bad_step.spike_factor=1.0", "train.bad_step.spike_factor", "greater than 1"),
    ("train.bad_step.spike_window=0", "train.bad_step.spike_window", "greater than 0"),
    ("train.bad_step.lag=2", "train.bad_step.lag", "expected one of [0, 1]"),
    ("train.bad_step.max_bad_steps=0", "train.bad_step.max_bad_steps", "greater than 0"),
    ("faults=[{kind: exit, rank: 0}]", "faults[0].step", "must be given"),
    (
        "faults=[{kind: boom, rank: 0, step: 3}]",
        "faults",
        "'sigkill', 'sigstop', 'sigsegv', 'hang', 'exception', 'exit', 'nan'",
    ),
    ("faults=[{kind: exit, rank: 2, step: 3}]", "faults[0].rank", "in [0, 2)"),
    ("faults=[{kind: exit, rank: 0, step: 201}]", "faults[0].step", "between 1 and 200"),
    ("faults=[{kind: exit, rank: 0, stop: 3}]", "faults", "stop"),
    ("faults[0].rank=1", "faults", ""),
]

WRONG_FILES = [
    (f"{MODEL}eval: {{ema: true}}", "eval.ema", "optim.ema"),
    (f"{MODEL}optim: {{ema: {{decay: 1.0}}}}", "optim.ema.decay", "in [0, 1)"),
    (f"{MODEL}optim: {{ema: {{every_steps: 0}}}}", "optim.ema.every_steps", "greater than 0"),
    (
        f"{MODEL}checkpoint: {{keep: {{last: 1, best: 1, metric: ema_held_out_loss}}}}",
        "checkpoint.keep.metric",
        "eval.ema",
    ),
    (f"{MODEL}optim: {{name: sgd}}\ntrain: {{bad_step: {{lag: 1}}}}", "train.bad_step.lag", "sgd cannot"),
    ("checkpoint: {memory_partner: true}\n", "checkpoint.memory_partner", "set checkpoint.memory_every_steps"),
    (
        f"{MODEL}cluster: {{use_gpu: true, resources_per_worker: {{GPU: 0.5}}}}",
        "cluster.resources_per_worker",
        "GPU must be 1, not 0.5",
    ),
    (f"{MODEL}cluster: {{use_gpu: true, resources_per_worker: {{GPU: 0}}}}", "cluster.resources_per_worker", "not 0"),
    ("train: {step: 3}", "train.step", "did you mean 'steps'?"),
    ("train: {steps: abc}", "train.steps", "could not be converted to Integer"),
    ("train: 5", "train", "section of several keys"),
    ("run: {name: ../up}", "run.name", "without '..'"),
    ("run: {name: !!python/object/apply:os.getcwd []}", "run.name", "begins with a tag"),
    ("run: {storage_path: '${oc.env:AREAL_RAY_NOT_SET}'}", "run.storage_path", "'AREAL_RAY_NOT_SET' not found"),
    ("cluster: {num_workers: 3}", "train.global_batch_size", "the nearest that can: 6 or 9"),
    ("cluster: {num_workers: 6}\nengine: {mesh: {tensor: 2}}", "train.global_batch_size", "3 groups of workers"),
    ("engine: {mesh: {replicate: 2, tensor: 2}}", "engine.mesh.tensor", "2 x 2 does not divide cluster.num_workers=2"),
    (
        "cluster: {num_workers: 4}\nengine: {mesh: {shard: 4, tensor: 2}}",
        "engine.mesh.shard",
        "1 x 4 x 2 must be cluster.num_workers=4",
    ),
    ("faults: [{kind: exit, step: 3}]", "faults[0].rank", "must be given"),
    ("data: {source: text}", "data.paths", "needs files"),
    ("data: {mixture: [{name: a}], held_out: 0.1}", "data.held_out", "put it into its entries"),
    ("data: {source: datasets, paths: [a], packing: best_fit}", "data.packing", "are concatenated"),
    ("defaults: [{modle: tiny}]", "defaults", "did you mean 'model'?"),
    ("defaults: [tiny]", "defaults", "`- model: tiny`"),
    ("model: {factory: a:b, config: {model_type: qwen3}}", "model.config", "either model.config"),
    ("model: {}", "model.config", "either model.config"),
    ("model: {factory: a.b}", "model.factory", "package.module:name"),
    ("model: {config: {vocab_size: 300}}", "model.config", "model_type is missing"),
    ("- a list", "", "a mapping of keys to values"),
    ("train: [", "", "is no YAML: expected the node content, but found '<stream end>' (line 2, column 9)"),
    ("train: {seed: " + "9" * 5000 + "}", "", "Exceeds the limit (4300 digits)"),
    ("faults: [{kind: sigkill, step: 010}]", "faults[0].step", "010 would be read as 8"),
]


def failure(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load(str(path), overrides)
    assert len(str(caught.value).splitlines()) == 1
    assert str(caught.value).startswith(f"{caught.value.source}: ")
    return caught.value


@pytest.mark.parametrize(("override", "key", "part"), WRONG_OVERRIDES, ids=[row[0] for row in WRONG_OVERRIDES])
def test_a_wrong_override_is_explained(override, key, part):
    error = failure(TINY, override)
    assert error.source == "command line"
    assert error.key.startswith(key)
    assert part in error.message


@pytest.mark.parametrize(("text", "key", "part"), WRONG_FILES, ids=[row[0] for row in WRONG_FILES])
def test_a_wrong_experiment_is_explained(tmp_path, text, key, part):
    path = tmp_path / "wrong.yaml"
    path.write_text(text if text.startswith(("model", "- ")) else MODEL + text)
    error = failure(path)
    assert error.source == str(path)
    assert error.key == key
    assert part in error.message


def test_the_ranks_of_a_tensor_group_share_rows_and_so_do_not_divide_the_batch():
    sizes = ["cluster.num_workers=8", "engine.mesh.tensor=4", "train.global_batch_size=6"]
    assert load(TINY, sizes).engine.mesh.tensor == 4
    error = failure(TINY, *sizes[:1], "train.global_batch_size=6")
    assert error.key == "train.global_batch_size"


def test_an_experiment_that_does_not_exist_is_named_with_its_neighbour(tmp_path):
    (tmp_path / "tiny.yaml").write_text(MODEL)
    error = failure(tmp_path / "tinny.yaml")
    assert (error.source, error.message) == (str(tmp_path / "tinny.yaml"), "no such file; did you mean 'tiny'?")


def test_a_group_that_the_experiment_names_and_that_does_not_exist_is_the_experiment_s_mistake(tmp_path):
    (tmp_path / "conf" / "model").mkdir(parents=True)
    (tmp_path / "conf" / "model" / "small.yaml").write_text("config: {model_type: qwen3}")
    path = tmp_path / "conf" / "experiment.yaml"
    path.write_text("defaults: [{model: smal}]")
    error = failure(path)
    assert "did you mean 'small'?" in error.message
    assert error.source == str(path)


def test_a_mistake_in_a_group_names_the_group_s_file(tmp_path):
    group = tmp_path / "conf" / "cluster" / "wrong.yaml"
    group.parent.mkdir(parents=True)
    group.write_text("num_worker: 3")
    path = tmp_path / "conf" / "experiment.yaml"
    path.write_text(MODEL + "defaults: [{cluster: wrong}]")
    error = failure(path)
    assert (error.source, error.key) == (str(group), "cluster.num_worker")
    assert "did you mean 'num_workers'?" in error.message


def test_a_python_object_in_a_file_is_not_made(tmp_path):
    path = tmp_path / "evil.yaml"
    path.write_text(f"{MODEL}run: {{name: !!python/object/apply:os.mkdir ['{tmp_path}/made']}}")
    failure(path)
    failure(TINY, f"run.name=!!python/object/apply:os.mkdir ['{tmp_path}/made']")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("override", ["bad", "train.step=3"])
def test_the_command_line_exits_with_2_and_one_line(capsys, override):
    assert main(["train", "--config", TINY, override]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(f"config error: command line: {override.partition('=')[0]}: ")
    assert err.count("\n") == 1


def test_what_is_found_while_looking_at_files_exits_with_2_and_names_the_source(capsys, tmp_path):
    storage = f"run.storage_path={tmp_path}"
    assert main(["train", "--config", TINY, "data=text", f"data.paths=[{tmp_path}/nothing]", storage]) == 2
    assert capsys.readouterr().err == (
        f"config error: command line: data.paths: no file matches '{tmp_path}/nothing'\n"
    )


def test_print_config_prints_yaml_that_loads_back(capsys, tmp_path):
    assert main(["train", "--config", TINY, "--print-config", "train.steps=300"]) == 0
    path = tmp_path / "printed.yaml"
    path.write_text(capsys.readouterr().out)
    assert load(str(path)) == load(TINY, ["train.steps=300"])
