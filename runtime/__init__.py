"""The ground floor: the HiF4 format, its operators, and what opens and runs an artifact."""
