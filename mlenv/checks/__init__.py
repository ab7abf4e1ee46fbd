"""The judgement of data before and beside trainings."""
