"""ESAM inside other people's trainers. Each module needs its own optional extra.

- `esam_torch.integrations.accelerate`: a `backward` for Accelerate's loop.
- `esam_torch.integrations.transformers`: `ESAMTrainer`, in place of Hugging Face's `Trainer`.
- `esam_torch.integrations.lightning`: `ESAMMixin`, for a LightningModule.
"""
