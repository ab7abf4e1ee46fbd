"""Every speed claim as a command: ``python -m benchmarks`` runs all, ``python -m benchmarks loader`` one."""
