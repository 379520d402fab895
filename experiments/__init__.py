"""The paper's tables and figures as commands, and studies: python -m experiments.NAME."""
