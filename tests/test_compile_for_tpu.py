"""scripts/compile_for_tpu.py, as a user starts it: its programs, its exit codes, its one-line refusals."""

import importlib.util
import json
import math
import os
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "compile_for_tpu.py"

pytestmark = pytest.mark.slow
needs_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="needs the TPU compiler: pip install -e '.[libtpu]' (scripts/test.sh --all does)",
)


def _python(*arguments):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )


def _cells(output, label):
    """The numbers of a line of the table."""
    (line,) = (line for line in output.splitlines() if line.strip().startswith(label))
    return [float(number.replace(",", "")) for number in re.findall(r"-?[\d,]*\d(?:\.\d+)?", line.partition(label)[2])]


@needs_compiler
def test_the_shipped_model_compiles_and_fits():
    result = _python(SCRIPT, "--model=arithmetic", "--topology=v5e:4x4", "--mesh=2,8,1")
    assert result.returncode == 0, result.stderr
    assert "16 devices: data 2, fsdp 8, tensor 1" in result.stdout
    assert result.stdout.count(" fits") == 5  # sampler, segment, regroup, scoring, update
    assert "Traceback" not in result.stderr
    # 2 layers of 2 (keys, values) x 32 prompts x (512 + 8 samples x 1536) tokens x 2 heads x 16 x 2 bytes, over 16.
    expected = 2 * 2 * 32 * (512 + 8 * 1536) * 2 * 16 * 2 / 16 / 2**20
    assert _cells(result.stdout, "of which KV cache, from its shape: at most")[0] == pytest.approx(expected, abs=0.05)
    # 64 rows of 2,048 tokens, forward twice and backward once, cannot be free, nor can a batch of 16 devices be silent.
    assert _cells(result.stdout, "matrix products, from shapes")[2] > 0
    assert _cells(result.stdout, "all-reduce")[8] > 0
    # The programs that decode see after each token whether all devices are done; the others have no loop over tokens.
    of_token = _cells(result.stdout, "in the loop over tokens: how many a token")
    assert of_token[0] > 0
    assert of_token[1] > 0
    assert of_token[2:] == [0, 0, 0]


@needs_compiler
def test_sizes_of_a_run_and_the_shape_of_a_directory(tmp_path):
    shape = {
        "model_type": "qwen3",
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
    }
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(shape))
    run = "--config=experiments/configs/math_reasoning.py:qwen3_0_6b,grpo,smoke"
    result = _python(SCRIPT, f"--model={tmp_path}", "--topology=v5e:4x4", run)
    assert result.returncode == 0, result.stderr
    assert "8 prompts x 4 samples of 512 + 32 tokens, 4 prompts at one time" in result.stdout
    assert "updates of 16 rows, 16 at one time" in result.stdout
    assert "16 devices: data 1, fsdp 16, tensor 1" in result.stdout


@needs_compiler
def test_what_does_not_fit_exits_1():
    # 7 billion parameters: float32 weights and two Adam moments alone are 21 GiB on each of 4 chips.
    result = _python(SCRIPT, "--model=qwen2-7b", "--topology=v5e:2x2", "--prompts=4", "--group_size=4")
    assert result.returncode == 1, result.stderr
    assert "update does not fit" in result.stdout


@needs_compiler
@pytest.mark.parametrize(
    ("flag", "part"),
    [
        ("--model=gpt", "one of qwen2-0.5b, qwen2-1.5b, qwen2-7b, qwen3-0.6b"),
        ("--model=gpt", "arithmetic, or a directory"),
        ("--model=tests", "config.json"),
        ("--config=experiments/configs/arithmetic.py", "task.name=text only"),
        ("--config=nowhere.py", "nowhere.py"),
        ("--config=experiments/configs/math_reasoning.py:sgd", "MODEL,METHOD,SIZE"),
        ("--topology=v9:4x4", "not one of v5e, v5p, v6e"),
        ("--topology=v5e:3x7", "--topology=v5e:3x7"),
        ("--topology=v5p-17", "one of v5p-8, v5p-16"),
        ("--mesh=2,2,1", "needs 4 devices, but there are 16"),
        ("--mesh=1,x,1", "--mesh=1,x,1"),
        ("--micro_batch_size=8", "not a multiple of the 16 data-parallel devices"),
        ("--prompts=30", "not a multiple"),
        ("--group_size=1", "group_size"),
        ("--rows --lengths=512", "prompt + response tokens, such as 512+1536"),
        ("--no_such_flag=1", "no_such_flag"),
        ("stray", "stray"),
    ],
)
def test_a_bad_flag_is_one_line_and_exit_2(flag, part):
    result = _python(SCRIPT, *flag.split())
    assert result.returncode == 2
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("compile_for_tpu: ")
    assert part in line


def test_without_the_compiler_it_says_how_to_get_it():
    hidden = f"import runpy, sys; sys.modules['libtpu'] = None; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    result = _python("-c", hidden)
    assert result.returncode == 2
    (line,) = result.stderr.splitlines()
    assert "pip install -e '.[libtpu]'" in line


def test_collectives_are_counted_by_kind():
    program = """
%all-reduce-scatter.1 (p: bf16[8,4]) -> bf16[2,4] {
  %all-reduce.7 = bf16[8,4]{1,0} all-reduce(%p), replica_groups={{0,1}}
}
%body (p: f32[2]) -> f32[2] {
  %all-gather.1 = bf16[16,8]{1,0:T(8,128)} all-gather(%x), frontend_attributes={chain_id="3"}
  %all-gather.2 = bf16[16,8]{1,0:T(8,128)} all-gather(%y), frontend_attributes={chain_id="3"}
  %all-gather.3 = f32[4]{0} all-gather(%z), dimensions={0}
  ROOT %all-reduce.9 = (f32[2]{0}, f32[3]{0}) all-reduce(%a, %b), to_apply=%add
  %cp = (f32[5]{0}, f32[5]{0}, u32[], u32[]) collective-permute-start(%c), source_target_pairs={{0,1}}
  %cp-done = f32[5]{0} collective-permute-done(%cp)
  %fusion = bf16[2,4]{1,0} fusion(%d), kind=kCustom, calls=%all-reduce-scatter.1
}
"""
    code = f"import runpy; print(runpy.run_path({str(SCRIPT)!r})['collectives']({program!r}))"
    result = _python("-c", code)
    assert result.returncode == 0, result.stderr
    # Two parts of one all-gather count once; 16 x 8 bfloat16 are 256 bytes, 8 x 4 are 64, 3 and 5 float32 12 and 20.
    assert eval(result.stdout) == {
        "reduce-scatter": (1, 64),
        "all-gather": (2, 256),
        "all-reduce": (1, 12),
        "collective-permute": (1, 20),
    }


@needs_compiler
def test_the_best_mesh_is_a_row_of_a_table():
    small = ("--prompts=8", "--group_size=2", "--num_minibatches=2")
    result = _python(
        SCRIPT, "--rows", "--model=arithmetic,qwen2-7b", "--topology=v5e-4", "--lengths=16+32,32+256", *small
    )
    assert result.returncode == 1, result.stderr  # 7 billion parameters do not fit on 4 chips
    titles, rule, *rows = result.stdout.splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert len(titles.split("|")) == len(rule.split("|")) == len(rows[0].split("|")) == len(rows[-1].split("|"))
    assert [row[:3] for row in cells] == [
        [model, "v5e-4", length] for model in ("arithmetic", "qwen2-7b") for length in ("16 + 32", "32 + 256")
    ]
    assert all(math.prod(map(int, row[3].split(","))) == 4 and float(row[11]) >= 0 for row in cells[:2])
    assert all("at least" in row[3] for row in cells[2:])


@needs_compiler
def test_a_search_ranks_meshes_and_says_why_others_are_out():
    small = ("--prompts=4", "--group_size=4", "--prompt_length=16", "--response_length=32", "--num_minibatches=2")
    result = _python(SCRIPT, "--model=arithmetic", "--topology=v5e-8", "--search", "--compile=2", *small)
    assert result.returncode == 0, result.stderr
    table, best = result.stdout.split("\nthe best:\n")
    lines = {line.split()[0]: line for line in table.splitlines()[1:]}
    assert len(lines) == 10  # data * fsdp * tensor = 8
    seconds = [float(line.split()[-1]) for line in list(lines.values())[:2]]
    assert seconds == sorted(seconds)
    assert "4 heads do not divide over 8" in lines["1,1,8"]
    assert "4 prompts do not divide over 8 devices" in lines["8,1,1"]
    assert best.count(" fits") == 5


# Prints kernels of each program that reads whole rows, and collectives of a token, for each chip and head size.
KERNELS = """
import runpy, sys
script = runpy.run_path(sys.argv[1])
import jax.numpy as jnp
from planner import programs
from planner.arithmetic import Workload
from r2vpo_jax import models, sharding

sizes = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 256, "num_layers": 2, "num_heads": 4}
script["FLAGS"]([""])
work = Workload(8, 8, 2, 64, 192, 1, 4, 64)
for chip in ("v5e:2x2", "v5p:2x2x1", "v6e:2x2"):
    mesh = sharding.make_mesh((1, 2, 2), script["devices_of"](chip))
    for size in (64, 128):
        decoder = models.DecoderConfig(**sizes, num_kv_heads=2, head_dim=size, compute_dtype=jnp.bfloat16, scan_layers=True)
        for name, lowered in script["lower"](script["make_learner"](decoder, mesh, work), work):
            report = programs.compile_program(lowered)
            print(chip, size, name, report.kernels, int(report.step.count), report.flops is None)
"""


@needs_compiler
def test_kernels_and_segments_compile_for_each_chip_and_head_size():
    result = _python("-c", KERNELS, SCRIPT)
    assert result.returncode == 0, result.stderr
    found = [line.split() for line in result.stdout.splitlines()]
    assert len(found) == 3 * 2 * 5
    for chip, size, name, kernels, collectives, uncounted in found:
        where = (chip, size, name)
        # Prompts of 64 tokens are too short for a kernel; scoring has one, and its backward pass two.
        expected = {"scoring": 1, "update": 3}.get(name, 0)
        assert int(kernels) == expected, where
        assert (uncounted == "True") == (expected > 0), where
        assert (int(collectives) > 0) == (name in ("sampler", "segment")), where


# The script's programs for 8 devices of this machine instead of a pod; prints the largest results.
ON_CPU = """
import os, runpy, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
script = runpy.run_path(sys.argv[1])
import jax, jax.numpy as jnp
from r2vpo_jax import config, models, sharding
from r2vpo_jax.training import learner

lower, flags = script["lower"], script["FLAGS"]
flags(["", "--prompts=8", "--group_size=2", "--prompt_length=8", "--response_length=256", "--num_minibatches=1"])
sizes = {"vocab_size": 16_384, "hidden_size": 64, "intermediate_size": 128, "num_heads": 4, "num_kv_heads": 2}
decoder = models.DecoderConfig(**sizes, head_dim=16, num_layers=2, tie_word_embeddings=sys.argv[2] == "tied")
trainer = config.TrainerConfig(prompts_per_rollout=8, num_minibatches=1, micro_batch_size=8, allow_single_update=True)
run = config.Config(trainer=trainer, sampler=config.SamplerConfig(group_size=2))
for name, lowered in lower(learner.Learner(models.Decoder(decoder), run, sharding.make_mesh((1, 8, 1)))):
    found = script["collectives"](lowered.compile().as_text())
    print(name, max((size for _, size in found.values()), default=0))
"""


@pytest.mark.parametrize("head", ["tied", "untied"])
def test_no_program_moves_a_whole_unembedding(head):
    # It would be moved for every chunk of logits; the hidden states are moved instead.
    result = _python("-c", ON_CPU, SCRIPT, head)
    assert result.returncode == 0, result.stderr
    largest = {name: int(size) for name, size in (line.split() for line in result.stdout.splitlines())}
    assert set(largest) == {"sampler", "segment", "regroup", "scoring", "update"}
    for name, size in largest.items():
        assert size < 16_384 * 64 * 4 / 2, name


# The largest result of a collective when rows move to a smaller batch, on 8 devices of this machine.
REGROUP = """
import os, runpy, sys
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"
script = runpy.run_path(sys.argv[1])
import jax
from planner import programs
from planner.arithmetic import Workload
from r2vpo_jax import models, sharding

sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_layers": 6, "num_heads": 4}
decoder = models.DecoderConfig(**sizes, num_kv_heads=2, head_dim=16, scan_layers=True)
work, mesh = Workload(8, 8, 2, 8, 256, 1, 8, 64), sharding.make_mesh((2, 4, 1), jax.devices())
script["FLAGS"]([""])
lowered = programs.lower_regroup(script["make_learner"](decoder, mesh, work), work)
print(max(size for _, size in script["collectives"](lowered.compile().as_text()).values()))
"""


def test_rows_move_without_gathering_the_caches_of_all_layers():
    result = _python("-c", REGROUP, SCRIPT)
    assert result.returncode == 0, result.stderr
    of_layer = 16 * 2 * 256 * 16 * 4  # keys of 16 rows; 8 of them move
    assert 0 < int(result.stdout) <= of_layer
