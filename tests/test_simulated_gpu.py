"""Runs on a simulated GPU, where tensors of two devices cannot meet: what a machine without a GPU can show of one."""

import pytest
from families import save_tiny, save_vision_model
from helpers import flags, read_json, save_captioner
from processes import server


ON_CPU, ON_GPU = {"use_cpu": True}, {"use_cpu": None}
SHORT = {"num_train_epochs": None, "max_steps": 3, "do_predict": False, "save_strategy": "no", "num_beams": 2}
SHORT |= {"load_best_model_at_end": False, "logging_steps": 1}


def run_on_gpu(words, code=0):
    return server().run(["tests/simulated_gpu.py", *words], code, environment={"PYTHONPATH": "."})


@pytest.mark.parametrize(
    ("line", "status", "printed"),
    [
        ("x + torch.ones(2)", 1, "add: expected all tensors to be on the same device"),
        ("torch.nn.Linear(2, 2)(x)", 1, "expected all tensors to be on the same device"),
        ("torch.cat([x, x.cpu()])", 1, "cat: expected all tensors to be on the same device"),
        ("x.numpy()", 1, "use Tensor.cpu() first"),
        ("x[torch.tensor([0])] * 2.0 + torch.tensor(1.0)", 0, "waits: {'_to_copy': 1}"),
        ("x[x > 0].tolist()", 0, "'index': 1"),
        ("x.double()", 0, "waits: {'_to_copy': 1}"),
    ],
)
def test_what_a_gpu_refuses_the_simulated_one_refuses(tmp_path, line, status, printed):
    (tmp_path / "script.py").write_text(f"import torch\nx = torch.arange(2.0).to('simulated')\n{line}\n")
    assert printed in run_on_gpu([tmp_path / "script.py"], status).stderr


def test_a_gpu_without_float64_refuses_it(tmp_path):
    (tmp_path / "script.py").write_text("import torch\ntorch.zeros(2, dtype=torch.float64, device='simulated')\n")
    assert "cannot convert" in run_on_gpu(["--without_float64", tmp_path / "script.py"], code=1).stderr


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--without_float64"]])
def test_a_run_on_a_gpu_has_the_scores_of_one_on_a_cpu(config_file, raw_dataset, parquet_folder, tmp_path, options):
    for name, device in {"cpu": ON_CPU, "gpu": ON_GPU}.items():
        words = ["run_captioning.py", *flags(config_file, parquet_folder, tmp_path / name, **device)]
        run_on_gpu([*options, *words]) if name == "gpu" else server().run(words)
    results = {name: read_json(tmp_path / name / "all_results.json") for name in ("cpu", "gpu")}
    for key in ("train_loss", "eval_loss", "predict_loss"):
        assert results["gpu"][key] == pytest.approx(results["cpu"][key], rel=1e-4)
    assert (tmp_path / "gpu" / "report.html").exists()

    for i, image in enumerate(raw_dataset["test"]["image"]):
        image.save(tmp_path / f"{i}.png")
    words = ["-m", "captioning", "caption", tmp_path / "gpu", *sorted(tmp_path.glob("*.png")), "--device"]
    assert run_on_gpu([*words, "simulated"]).stdout == server().run([*words, "cpu"]).stdout != ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        {"objective": "self_critical", "num_samples": 2, "reward": "rougeL"},
        {"concept_loss_weight": 0.5, "min_concept_count": 2},
        {"gradient_checkpointing": True, "freeze_vision_model": True},
        {"tune_decoding": True},
        {"use_peft": True, "merge_lora": True},
    ],
    ids=lambda more: next(iter(more)),
)
def test_other_ways_of_training_keep_their_tensors_on_the_gpu(captioner, parquet_folder, tmp_path, more):
    save_captioner(captioner, tmp_path / "start")
    more |= {"model_name_or_path": tmp_path / "start", "vocab_size": None} | SHORT | ON_GPU
    run_on_gpu(["run_captioning.py", *flags(None, parquet_folder, tmp_path / "run", **more)])


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "blip-2-opt", "blip-2-t5", "git"])
def test_other_captioners_keep_their_tensors_on_the_gpu(parquet_folder, tmp_path, family):
    more = {"model_name_or_path": save_tiny(family, tmp_path / "start"), "vocab_size": None} | SHORT | ON_GPU
    if family == "llava":
        more |= {"retrieved_captions": 2, "retriever": save_vision_model(tmp_path / "retriever")}
    run_on_gpu(["run_captioning.py", *flags(None, parquet_folder, tmp_path / "run", **more)])
