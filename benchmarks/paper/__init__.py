"""The tables and figures of the paper: Du et al., ICLR 2022 (arXiv 2110.03141)."""
