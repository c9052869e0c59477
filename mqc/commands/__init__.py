"""The subcommands of ``mqc``, each a thin layer over :mod:`mqc.api`."""
