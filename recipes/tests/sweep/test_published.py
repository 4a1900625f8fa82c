"""The twelve published ids, from configurations written as the study wrote them."""

import json

import pytest

from sweep.published import DEPLOYMENT, IDS, TRAINING, write_deployment
from vestige.errors import SpecError
from vestige_recipes.sweep import read_published

SECOND_SPLIT = {"arc": "eRBo19GJ5DFDPuIPV809GA", "ethics": "F-YNKVV6BmvAi-547IiC4w"}


@pytest.fixture
def deployed(tmp_path):
    def write(model="mistral", dataset="mmlu", training=TRAINING, deployment=DEPLOYMENT):
        return write_deployment(tmp_path, model, dataset, training, deployment)

    return write


@pytest.mark.parametrize(("model", "dataset"), IDS)
def test_published_ids_of_a_set_up(deployed, model, dataset):
    published = read_published(deployed(model, dataset))
    assert (published.training.config_id, published.deployment_id) == IDS[model, dataset]


@pytest.mark.parametrize("dataset", SECOND_SPLIT)
def test_published_id_of_the_second_split_alone_and_as_a_cell(deployed, tmp_path, dataset):
    path = deployed("mistral", dataset)
    assert list(read_published(path).trainings())[1].config_id == SECOND_SPLIT[dataset]
    alone = tmp_path / "second.cfg"
    alone.write_text(TRAINING.format(model="mistral", dataset=dataset, split_id=1))
    assert read_published(alone).training.config_id == SECOND_SPLIT[dataset]
    assert read_published(alone).deployment_id == SECOND_SPLIT[dataset]


def test_the_text_behind_an_id_is_the_published_one(deployed):
    assert read_published(deployed()).training.id_text == (
        "model=mistralai/Mistral-7B-v0.1;dataset=cais/mmlu;max_len=512;label_noise=0.03334;split_prop=0.5;"
        "lora_dropout=0.5;last_token_only=True;bf16=True;gradient_accumulation_steps=2;gradient_checkpointing=False;"
        "learning_rate=2.5e-05;optim=adamw_torch;per_device_train_batch_size=2;remove_unused_columns=False;"
        "warmup_steps=5;"
    )


def test_json_and_ini_have_the_same_id(deployed, tmp_path):
    published = read_published(deployed()).training
    sections = {
        "main": {"model": "mistral", "dataset": "mmlu"},
        "preprocess": {"max_len": 512, "label_noise": 0.03334},
        "random_split": {"split_prop": 0.5},
        "lora": {"lora_dropout": 0.5},
        "loss": {"last_token_only": True},
        "training_args": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2},
    }
    (tmp_path / "same.json").write_text(json.dumps(sections))
    assert read_published(tmp_path / "same.json").training.config_id == published.config_id


def test_a_seed_of_the_data_is_keyed_as_the_published_software_keys_it(deployed):
    text = TRAINING.replace("label_noise = 0.03334", "data_seed = 7")
    assert ";label_noise=7;" in read_published(deployed(training=text)).training.id_text


def test_lists_ranges_and_training_arguments_are_swept(deployed):
    more = """
[training_args.learning_rate]
mode = list
val_2 = 1e-4
val_1 = 5e-5
"""
    published = read_published(deployed(deployment=DEPLOYMENT.replace("99", "1") + more))
    assert published.axes == {"split_id": (0, 1), "training_args.learning_rate": (5e-5, 1e-4)}
    trainings = list(published.trainings())
    assert [each.training_args["learning_rate"] for each in trainings] == [5e-5, 1e-4, 5e-5, 1e-4]
    assert [each.values["split_id"] for each in trainings] == [0, 0, 1, 1]
    assert len({each.config_id for each in trainings}) == 4


def test_a_deployment_becomes_a_grid_of_train(deployed):
    grid = read_published(deployed(dataset="arc")).grid()
    assert (grid["verb"], grid["mode"]) == ("train", "product")
    assert grid["axes"] == {"split_seed": list(range(100))}
    base = grid["base"]
    assert base["data"] == "data/ai2_arc-noise0.03334-seed0"
    assert base["model"] == "mistralai/Mistral-7B-v0.1"
    expected = {"epochs": 10, "split_fraction": 0.5, "lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.5}
    expected |= {"learning_rate": 2.5e-5, "batch_size": 2, "accumulation": 2, "warmup": 5, "loss": "answer"}
    assert expected.items() <= base.items()


def test_settings_of_which_models_are_kept_are_replaced_aloud(deployed, capsys):
    grid = read_published(deployed()).grid()
    assert grid["base"]["checkpoints"] == "0,0.2,...,1,2,..."
    told = capsys.readouterr().err
    assert "save_steps=50" in told
    assert "after_c_only_every_n=250,250" in told


@pytest.mark.parametrize(
    ("training", "deployment", "message"),
    [
        ("[general]", "[main]", "unknown key|no model or no dataset"),
        (TRAINING.replace("lora_dropout", "lora_dropuot"), DEPLOYMENT, r"\[lora\] has no 'lora_dropuot'"),
        (TRAINING.replace("[loss]", "[lossy]"), DEPLOYMENT, r"unknown section \[lossy\]"),
        (TRAINING, DEPLOYMENT.replace("base.cfg", "nowhere"), "base_config 'nowhere' is no file"),
        (TRAINING, DEPLOYMENT.replace("product", "each"), "mode = product or zip"),
        (TRAINING, DEPLOYMENT.replace("[split_id]", "[split_it]"), "Did you mean `split_id`"),
        (TRAINING, DEPLOYMENT.replace("mode = range", "mode = some"), "Expected range or list"),
    ],
)
def test_a_published_file_that_is_wrong_says_what(deployed, training, deployment, message):
    with pytest.raises(SpecError, match=message):
        read_published(deployed(training=training, deployment=deployment))


def test_what_has_no_counterpart_is_refused_and_not_dropped(deployed):
    with pytest.raises(SpecError, match="`label_smoothing_factor` of"):
        read_published(deployed(training=TRAINING + "label_smoothing_factor = 0.1\n")).grid()
    with pytest.raises(SpecError, match="questions are learned too"):
        read_published(deployed(training=TRAINING.replace("= true", "= false"))).grid()
