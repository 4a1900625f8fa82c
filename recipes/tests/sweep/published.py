"""The published configurations of five set-ups, as the study wrote them, and their published ids."""

TRAINING = """
[main]
model = {model}
dataset = {dataset}
[preprocess]
max_len = 512
label_noise = 0.03334
[random_split]
split_id = {split_id}
split_prop = 0.5
[lora]
lora_dropout = 0.5
[devices]
accelerator = cuda
[loss]
last_token_only = true
[training_args]
num_train_epochs = 10
save_steps = 50
after_c_only_every_n = 250,250
learning_rate = 2.5e-5
gradient_accumulation_steps = 2
per_device_train_batch_size = 2
"""
DEPLOYMENT = """
[split_id]
mode = range
stop = 99
start = 0
step = 1
[general]
mode = product
base_config = base.cfg
"""
IDS = {
    ("mistral", "arc"): ("wd1yKu7ifTBhJncAHIe3vA", "H5gQZhfMsLE5_NTX9hR7TA"),
    ("mistral", "ethics"): ("M-H-RqkPbMpWRGgOcg-PRA", "JNeyT5OUP3GFtJ_QNojppg"),
    ("mistral", "mmlu"): ("Ji5OIUTJGuYCYhAzj6KtZQ", "Z5n7bEDGK4JRT4HyLKSzrw"),
    ("llama", "mmlu"): ("0K1pZkoAv45RZXOIJl9kFw", "ZfTT7SCYBAzBtjT3_sy3wg"),
    ("gemma", "mmlu"): ("dRfdcYPXxygGJ2kuZfsYew", "mD9ImObzoCshT5dpStKiMA"),
}
"""Of the training configuration and of the deployment, by model and data."""


def write_deployment(folder, model, dataset, training=TRAINING, deployment=DEPLOYMENT):
    """The path of the deployment's file, with the training configuration beside it."""
    (folder / "base.cfg").write_text(training.format(model=model, dataset=dataset, split_id=0))
    (folder / "deployment.cfg").write_text(deployment)
    return folder / "deployment.cfg"
