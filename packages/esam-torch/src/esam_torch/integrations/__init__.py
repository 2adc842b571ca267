"""ESAM in trainers of other libraries, if they need more than `optimizer.loss`.

Each module needs an optional extra. Accelerate, Fabric and skorch need no integration; see the
documentation.

- `esam_torch.integrations.transformers`: `ESAMTrainer`, in place of Hugging Face's `Trainer`.
- `esam_torch.integrations.lightning`: `ESAMMixin`, a `training_step` for a LightningModule.
"""
