"""ESAM inside other people's trainers, where they need more than `optimizer.loss`.

Each module needs its own optional extra; see the docs for Accelerate, Fabric and skorch, which need
no code of ours.

- `esam_torch.integrations.transformers`: `ESAMTrainer`, in place of Hugging Face's `Trainer`.
- `esam_torch.integrations.lightning`: `ESAMMixin`, a `training_step` for a LightningModule.
"""
