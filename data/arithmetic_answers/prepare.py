"""
A run's own right answers, for a student to learn from: the run writes them itself.
"""
COMMAND = ('python -m extras.write_answers --out_dir=out-arithmetic-rl '
           '--folder=data/arithmetic_answers --num_samples=1 --num_examples=8000 '
           '--rows=128 --max_new_tokens=120')

if __name__ == '__main__':
    print(COMMAND)
