"""The ``chanzoo`` command: one small file per subcommand, and what they share in ``common``."""
