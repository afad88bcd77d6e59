"""The journal of a run in SQLite: schema, records, lineages, disk space and fsync."""
