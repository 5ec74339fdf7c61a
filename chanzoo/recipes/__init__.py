"""How to train: YAML files for the train script of timm, and the queue of wanted weights."""
