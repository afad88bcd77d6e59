"""The journal of a run in SQLite: schema, records, lineages, transactions, disk space and fsync."""
