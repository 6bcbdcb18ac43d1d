"""What a step needs on a card that is not there: `python -m train.plan`."""
