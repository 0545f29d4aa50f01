// The library's own threads. They spin for a moment between passes and then sleep, so that they neither delay the next
// pass nor take the processor from torch's threads when the model rests.
#pragma once
#include <stdint.h>

namespace hasten {

using Task = void (*)(void *context, int thread, int threads);

void set_threads(int count);  // the caller's included
int thread_count();
void run_on_all(Task task, void *context);  // returns when every thread has; one caller at a time
void barrier();                             // inside a task: waits for all threads
double now();                               // seconds

}  // namespace hasten
