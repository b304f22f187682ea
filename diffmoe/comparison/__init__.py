"""Studies: several configurations, several seeds, one table with paired differences."""
