"""Pipeline parallelism (report section 3.2): schedules as data, stages, and their execution."""
