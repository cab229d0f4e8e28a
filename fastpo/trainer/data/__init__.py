"""What is learned from: tasks, rows, the programs that judge, and the processes they run in."""
