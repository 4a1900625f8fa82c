"""Which tenth of a mixture to train on."""
