@echo off
rem One command from a fresh clone to a model that talks. Options: run_experiment.bat --help
where py >nul 2>nul
if errorlevel 1 (python "%~dp0run_experiment.py" %*) else (py -3 "%~dp0run_experiment.py" %*)
