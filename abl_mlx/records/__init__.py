"""What every command returns, prints with ``--json`` and keeps: frozen records, and their JSON."""
