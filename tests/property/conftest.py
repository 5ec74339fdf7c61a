"""One hypothesis profile for all properties: the same examples in every run, however slow the machine."""

from hypothesis import settings

settings.register_profile("chanzoo", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("chanzoo")
