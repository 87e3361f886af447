"""The whole program: command line, server, worker. What is started ends with this folder."""
