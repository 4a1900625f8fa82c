"""What several experiments share: data, models, banks, and how an outcome is judged and reported."""
