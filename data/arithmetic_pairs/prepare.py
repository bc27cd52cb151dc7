"""
Pairs of a right and a wrong answer, for stage dpo: a run writes them itself, from its own answers.
"""
COMMAND = ('python -m extras.write_answers --out_dir=out-arithmetic-sft '
           '--folder=data/arithmetic_pairs --pairs=True --num_samples=8 --num_examples=2000 '
           '--rows=128 --max_new_tokens=120')

if __name__ == '__main__':
    print(COMMAND)
